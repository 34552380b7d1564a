"""One file per command: flags in, calls of the Python API, console out. Heavy imports stand inside the functions."""
