"""One file per command: it reads flags, calls the Python API and prints. Heavy imports are inside the functions."""
