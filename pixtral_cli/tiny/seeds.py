"""Which seeds belong to training, so that evaluation can refuse them."""

TRAINING_SEEDS = range(10_000)
