"""A packed weight in, the layer that multiplies with it out."""
