"""One file per command: flags in, calls of the Python API, results on the console out. Heavy imports stand in functions."""
