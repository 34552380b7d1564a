"""Token ids in, token ids out, many requests at once. Knows no text, no files and no HTTP."""
