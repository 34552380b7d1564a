"""One file per command: flags in, printed results out. Heavy modules are imported inside the functions."""
