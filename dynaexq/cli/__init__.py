"""The command line, its tables and the demo."""
