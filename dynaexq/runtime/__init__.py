"""The runtime of a patched model: its layers, its tick, its report."""
