"""How far logits are from those of the exactly decoded weights, here and in llama.cpp, from the same bytes.

    python tests/benchmarks/logit_error.py [--encodings q4_k q6_k ...] [--layers 8] [--tokens 64]

Weights are drawn from a normal distribution, as transformers begins to train them, and encoded. The exact logits are
computed by transformers in float32, with weights that are decoded exactly. Printed is the root of the mean squared
difference over that of the logits: for a prompt computed whole, and for one computed token by token, as answers are.
Ours computes in bfloat16. Needs transformers, llama-cpp-python and gguf.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from pixtral_cli import Pixtral
from pixtral_cli.bench import hf_writer, model_files
from pixtral_cli.bench.llama_cpp_peer import Program, c
from pixtral_cli.encoding_choices import asked_for
from pixtral_cli.model.attention import AttendPaged, Span
from pixtral_cli.model.kv_cache import PAGE, KVCache, pages_for
from pixtral_cli.model.language_model import LanguageModel
from pixtral_cli.source import Source
from pixtral_cli.tiny import FOLDER

THREADS = torch.get_num_threads()
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "sliding_window": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encodings", nargs="+", default=["q4_0", "q4_k", "q6_k", "bfloat16"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    print(f"{'':10}{'prompt: ours':>14}{'llama.cpp':>12}{'ratio':>8}{'decode: ours':>16}{'llama.cpp':>12}{'ratio':>8}")
    for encoding in options.encodings:
        with tempfile.TemporaryDirectory() as folder:
            errors = measured(encoding, options.layers, options.tokens, Path(folder))
        (prompt, peers_prompt), (decode, peers_decode) = errors
        print(f"{encoding:10}{prompt:14.2e}{peers_prompt:12.2e}{prompt / peers_prompt:8.2f}", end="")
        print(f"{decode:16.2e}{peers_decode:12.2e}{decode / peers_decode:8.2f}")


def measured(encoding: str, layers: int, tokens: int, folder: Path) -> list[tuple[float, float]]:
    """Errors of ours and of llama.cpp: of a prompt, then of one token after the other."""
    path, exact = folder / "model", folder / "exact"
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, num_hidden_layers=layers)
    MistralForCausalLM(config).save_pretrained(folder / "drawn")
    shutil.copy(FOLDER / "tokenizer.json", folder / "drawn")
    drawn = Source.open(str(folder / "drawn"))
    drawn.save(path, drawn.placement(asked_for(encoding)))
    source = Source.open_serialized(path)
    hf_writer.write(source.checkpoint, "float32", exact)
    subject = model_files.Subject("drawn", source, {"serialized_model_path": str(path)})
    ids = random.Random(0).choices(range(config.vocab_size), k=tokens)
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(exact, dtype="float32")(torch.tensor([ids])).logits[0]
    files = model_files.for_llama_cpp(subject, folder)
    steps = (tokens, 1)
    found = zip(logits(path, ids, steps), peers_logits(files["gguf"], ids, steps), strict=True)
    return [(error(ours, wanted), error(peers, wanted)) for ours, peers in found]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


@torch.inference_mode()
def logits(path: Path, ids: list[int], steps: tuple[int, ...]) -> list[Tensor]:
    """Float32 [tokens, V], computed in passes of so many tokens."""
    model = Pixtral.load(serialized_model_path=str(path), max_length=1024).engine.model
    return [torch.cat(list(passes(model, ids, step))) for step in steps]


def passes(model: LanguageModel, ids: list[int], step: int):
    text, pages = model.config.text, list(range(pages_for(len(ids))))
    store = KVCache(text, model.dtype, model.device, len(pages) * PAGE)
    for first in range(0, len(ids), step):
        attend = AttendPaged(text, store, [Span(pages, first, step)], model.device)
        hidden = model(model.embed(torch.tensor(ids[first : first + step])), torch.arange(first, first + step), attend)
        yield model.logits(hidden)


def peers_logits(gguf: str, ids: list[int], steps: tuple[int, ...]) -> list[Tensor]:
    program = Program()
    program.load({"gguf": gguf, "device": "cpu"}, THREADS, 1024, 1)
    found = []
    for step in steps:
        program._for(1)
        rows = []
        for first in range(0, len(ids), step):
            batch = program._batch([(place, 0, True) for place in range(first, first + step)])
            for row in range(step):
                batch.token[row] = ids[first + row]
            program._decode(batch)
            rows += [
                np.ctypeslib.as_array(c.llama_get_logits_ith(program._context, row), (program._vocabulary,)).copy()
                for row in range(step)
            ]
            c.llama_batch_free(batch)
        found.append(torch.from_numpy(np.stack(rows)))
    return found


if __name__ == "__main__":
    main()
