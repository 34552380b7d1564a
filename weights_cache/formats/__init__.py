"""Weights files in, names, shapes and encodings out before any data, then tensors. One file for each file format."""
