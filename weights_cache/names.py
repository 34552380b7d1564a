"""A tensor's name in a Hugging Face file in, our name for it out. Knows no files and no shapes.

Sources: transformers' `save_pretrained` writes the older style for LLaVA and bare names for a text-only model
(run with 5.23); the newer style is its module names since 4.52, written with `save_original_format=False`.
A name that no row matches is kept as it is, so that whoever loads can report it in the file's own words.
"""

HF_PREFIXES: tuple[tuple[str, str], ...] = (
    # older: the language model is a complete causal LM inside the LLaVA module
    ("language_model.model.", "language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.transformer.layers.", "vision_tower.layers."),
    # newer: everything but the head lies in one `model`
    ("model.language_model.", "language_model."),
    ("model.vision_tower.transformer.layers.", "vision_tower.layers."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    # text only: MistralForCausalLM
    ("model.", "language_model."),
)
"""Rows of (prefix in the file, prefix of ours); the longest prefix that matches decides."""

DROPPED_SUFFIXES: tuple[str, ...] = (".inv_freq",)
"""Buffers that old versions saved and that are computed anew."""

NATIVE_MARKS: tuple[str, ...] = ("tok_embeddings.weight", "layers.0.attention.wq.weight")
"""Names that only Mistral's own files (consolidated.safetensors) contain."""

_LONGEST_FIRST = sorted(HF_PREFIXES, key=lambda row: len(row[0]), reverse=True)


def from_hf(name: str) -> str | None:
    """Our name for the tensor `name` of a Hugging Face file; None for one that is dropped.

    >>> from_hf("language_model.model.layers.3.mlp.up_proj.weight")
    'language_model.layers.3.mlp.up_proj.weight'
    """
    if name.endswith(DROPPED_SUFFIXES):
        return None
    for theirs, ours in _LONGEST_FIRST:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def looks_native(names: object) -> bool:
    """Whether a collection of tensor names is Mistral's native naming rather than Hugging Face's."""
    return any(mark in names for mark in NATIVE_MARKS)  # type: ignore[operator]
