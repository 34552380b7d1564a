"""What requests gain from each other: tokens per second in a batch, and time to the first token for a known picture.

    python tests/benchmarks/sharing.py

The batch runs on the built-in model. The picture has 4,160 tokens and goes to a Pixtral with random weights (0.4
billion parameters, bfloat16). Every figure is the median of several runs, with the smallest and the largest.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable

import torch

from pixtral_cli import Pixtral
from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.request import ImageInput, Request
from pixtral_cli.model.families import read_config
from pixtral_cli.model.language_model import LanguageModel
from pixtral_cli.model.load import empty

RUNS = 5
TOKENS = 200
SIDE = 64  # patches: the largest picture
IMAGE, BREAK = 10, 12
CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": IMAGE,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "head_dim": 64,
        "patch_size": 16,
        "image_size": 1024,
        "rope_theta": 1e4,
    },
}


def main() -> None:
    print(f"{torch.get_num_threads()} threads, medians of {RUNS} runs (smallest, largest)")
    engine = Pixtral.load("tiny", devices="cpu", max_batch_size=16).engine
    one, *more = [spread(lambda n=n: rate(engine, n)) for n in (1, 4, 8, 16)]
    print(f"built-in model, 1 request: {one[0]:.0f} ({one[1]:.0f}, {one[2]:.0f}) tokens/s")
    for count, found in zip((4, 8, 16), more, strict=True):
        figures = f"{found[0]:.0f} ({found[1]:.0f}, {found[2]:.0f}) tokens/s"
        print(f"built-in model, {count} together: {figures}, {found[0] / one[0]:.1f} times one")
    model = random_pixtral()
    pairs = [first_tokens(Engine(model, 8192), seed) for seed in range(RUNS)]
    first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
    shares = [later / before for before, later in pairs]
    print(f"picture of {SIDE * (SIDE + 1)} tokens: first token after {first:.2f} s, next question's {second:.2f} s")
    print(f"that is {statistics.median(shares):.3f} ({min(shares):.3f}, {max(shares):.3f}) of the first")


def spread(measure: Callable[[], float]) -> tuple[float, float, float]:
    measure()
    found = [measure() for _ in range(RUNS)]
    return statistics.median(found), min(found), max(found)


def rate(engine: Engine, requests: int) -> float:
    """Tokens a second of so many requests together, their short prompts included."""
    for number in range(requests):
        engine.submit(Request(tuple(range(20 + number, 60 + number)), TOKENS))
    begun, made = time.perf_counter(), 0
    while engine.busy:
        made += len(engine.step())
    return made / (time.perf_counter() - begun)


def random_pixtral() -> LanguageModel:
    torch.manual_seed(0)
    model = empty(read_config(CONFIG)).to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    return model.requires_grad_(False).eval()


def first_tokens(engine: Engine, seed: int) -> tuple[float, float]:
    """Seconds to the first token of a question about a new picture, and of another question about it."""
    pixels = torch.randn(3, SIDE * 16, SIDE * 16, generator=torch.Generator().manual_seed(seed))
    picture = ImageInput(hashlib.sha256(pixels.numpy().tobytes()).digest(), SIDE * SIDE, lambda: pixels)
    shown = [1, 3, *([IMAGE] * SIDE + [BREAK]) * SIDE]
    return tuple(first_token(engine, Request((*shown, *question), 1, (picture,))) for question in (Q1, Q2))


Q1, Q2 = tuple(range(100, 120)), tuple(range(200, 225))


def first_token(engine: Engine, request: Request) -> float:
    begun = time.perf_counter()
    engine.submit(request)
    while engine.busy:
        engine.step()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
