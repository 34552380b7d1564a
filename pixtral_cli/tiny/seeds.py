"""Which seeds training used, so that evaluation can refuse them: 0 for the tokenizer's text, 1 for the scenes."""

TRAINING_SEEDS = range(2)
