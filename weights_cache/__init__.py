"""A model's name or folder in, named tensors and side files out; knows no torch.nn, no prompt, no terminal."""
