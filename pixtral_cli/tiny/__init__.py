"""The built-in model: the folder of its weights, in ordinary Hugging Face form. Imports nothing heavy."""

from pathlib import Path

FOLDER = Path(__file__).parent / "weights"
TRAINING_SEEDS = range(2)
"""Seeds that training used, which evaluation refuses: 0 for the tokenizer's text, 1 for the scenes."""
