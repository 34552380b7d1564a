"""The names of models that the program knows by itself. Imports nothing, so that everything may ask."""

BUILT_IN = "tiny"
DEFAULT_MODEL = "mistral-community/pixtral-12b"
