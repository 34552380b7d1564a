"""Tensors in, logits out. Knows no text, no image files and no requests."""
