"""The built-in model with the control tokens of thoughts, which says what the test wants it to."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from pixtral_cli import Pixtral, constraints
from pixtral_cli.engine import grammar
from pixtral_cli.tiny import FOLDER

ASKED = {"response_format": {"type": "text"}}
"""With it a request asks for a grammar, in place of which the script comes."""


def thinking_folder(folder: Path) -> Path:
    """The built-in model in `folder`, two unused control tokens of which are [THINK] (20) and [/THINK] (21)."""
    for file in FOLDER.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "tokenizer.json").unlink()
    names = (FOLDER / "tokenizer.json").read_text()
    names = names.replace("<SPECIAL_20>", "[THINK]").replace("<SPECIAL_21>", "[/THINK]")
    (folder / "tokenizer.json").write_text(names)
    return folder


def thinking_model(folder: Path) -> Pixtral:
    return Pixtral.load(thinking_folder(folder), devices="cpu", max_batch_size=4, quantization_encoding="float32")


@contextmanager
def saying(lark: str):
    """Inside, every answer to a request with `ASKED` follows this Lark rule, such as ``<[20]> "a" <[21]> "b"``."""

    def scripted(prompt, options, tokenizer, vocabulary):
        return grammar.compile(vocabulary, f"start: {lark}", "the script")

    with patch.object(constraints, "constraint", scripted):
        yield
