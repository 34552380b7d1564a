"""Messages and images in, token ids and pixels out; knows no torch.nn, no engine, no terminal."""
