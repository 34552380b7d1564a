"""Tensors in, logits out. Knows no text, no pictures' files and no requests."""
