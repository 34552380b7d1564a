"""Writes the latest training checkpoint as a model folder in Hugging Face form.

`python -m pixtral_cli.tiny.training.write_weights runs/tiny`
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from pixtral_cli.tiny import FOLDER
from pixtral_cli.tiny.training.model import CONFIG, new_model
from pixtral_cli.tiny.training.tokenizer import BOS, EOS, PAD, save

# our names -> those that transformers writes for LlavaForConditionalGeneration
PREFIXES = {
    "vision_tower.layers.": "vision_tower.transformer.layers.",
    "language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def hf_name(name: str) -> str:
    for ours, theirs in PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def export(run: Path, folder: Path = FOLDER) -> None:
    """Write the model that the training in `run` has come to, with all its files, into `folder`."""
    masters = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)["masters"]
    names = [name for name, _ in new_model(0).named_parameters()]
    tensors = {
        hf_name(name): master.to(torch.bfloat16).contiguous()
        for name, master in zip(names, masters, strict=False)  # the heads of training come after the model's own
    }
    save(folder, run / "tokenizer.json")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    answers = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False}
    for name, content in (("config.json", CONFIG), ("generation_config.json", answers)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pixtral_cli.tiny.training.write_weights", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of training")
    parser.add_argument("--to", type=Path, default=FOLDER)
    options = parser.parse_args()
    export(options.run, options.to)


if __name__ == "__main__":
    main()
