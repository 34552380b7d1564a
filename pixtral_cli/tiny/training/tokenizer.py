"""Trains the tokenizer and writes its files: a byte-level BPE with the V3 control tokens.

Each capital and each digit is a token of its own that never merges, so printed text is spelled character by character.
All 256 bytes are tokens, so every byte string can be encoded and produced.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from pixtral_cli.tiny import FOLDER
from pixtral_cli.tiny.questions import KINDS, ask, ask_pair
from pixtral_cli.tiny.scenes import random_scene, scene_rng
from pixtral_cli.tiny.training.smalltalk import ABOUT, off_topic

CONTROL = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
)
RESERVED = 32  # control ids, the unused ones named <SPECIAL_17> …
VOCABULARY = 768
BOS, EOS, INST, END_INST, IMG, PAD, IMG_BREAK, IMG_END = 1, 2, 3, 4, 10, 11, 12, 13
SPLIT = r"[A-Z]|[0-9]| ?[a-z]+|\s+|[^A-Za-z0-9\s]"
TEMPLATE = FOLDER / "chat_template.jinja"


def control_tokens() -> list[str]:
    return [*CONTROL, *(f"<SPECIAL_{i}>" for i in range(len(CONTROL), RESERVED))]


def build() -> Tokenizer:
    """Train the tokenizer. Once a model was trained with one, that file is kept: new questions would change it."""
    tokenizer = Tokenizer(BPE(unk_token=None))
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True, normalized=False) for name in control_tokens()]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def _sentences(scenes: int = 4000) -> Iterator[str]:
    for index in range(scenes):
        rng = scene_rng(0, index, "tokenizer")
        first, second = random_scene(rng), random_scene(rng)
        for asked in [ask(rng, first, kind) for kind in KINDS] + [ask_pair(rng, first, second)]:
            if asked:
                yield from (asked.text, asked.answer)
        yield off_topic(rng)
        yield ABOUT


def save(folder: Path, tokenizer_file: Path) -> None:
    """Write a copy of the tokenizer with its config, the chat template and the processor's files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    template = TEMPLATE.read_text()
    (folder / TEMPLATE.name).write_text(template)
    for name, content in _side_files().items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _side_files() -> dict[str, dict]:
    pictures = {
        "image_processor_type": "PixtralImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": 1024},
        "patch_size": {"height": 16, "width": 16},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    processor = {
        "processor_class": "PixtralProcessor",
        "patch_size": 16,
        "spatial_merge_size": 1,
        "image_token": "[IMG]",
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "PixtralProcessor",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "model_max_length": 16384,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer_config.json": tokenizer,
        "processor_config.json": processor,
        "preprocessor_config.json": {**pictures, "processor_class": "PixtralProcessor"},
    }
