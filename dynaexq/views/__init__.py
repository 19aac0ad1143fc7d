"""A snapshot of a runtime for people: in a terminal and as HTML. It knows plain data only; see `Runtime.snapshot`."""
