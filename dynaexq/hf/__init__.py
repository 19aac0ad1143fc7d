"""Where dynaexq meets Transformers: finding experts, patching, loading, saving. Imported module by module."""
