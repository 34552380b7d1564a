"""The built-in model: `FOLDER` is where its weights lie, in ordinary Hugging Face form; nothing heavy is imported."""

from pathlib import Path

FOLDER = Path(__file__).parent / "weights"
