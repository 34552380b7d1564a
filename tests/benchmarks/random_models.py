"""Sizes in, a model of random weights out, made where it is to run: what a card does is measured without a checkpoint.

The weights take the way of a checkpoint's: `RandomCheckpoint` answers what `model.load` asks of one, with bytes that no
file holds. Packed ones are random as well, codes of every value and scales that give weights of about STD: nothing is
encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from pixtral_cli.model import load
from pixtral_cli.model.config import ModelConfig
from pixtral_cli.model.families import read_config
from pixtral_cli.model.language_model import LanguageModel
from pixtral_cli.model.placement import FLOATS, place
from weights_cache.codecs.fp8 import FP8
from weights_cache.codecs.nf4 import NF4
from weights_cache.encodings import ENCODINGS
from weights_cache.formats.reader import TensorInfo
from weights_cache.names import HEAD
from weights_cache.packed import PackedRows

STD = 0.02
SPOKEN = 768
"""Rows of the head that are not zero: the likeliest token is one that the built-in model's tokenizer can write."""

NEMO = {
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "sliding_window": None,
}
TINY = NEMO | {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TINY_TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPES = {"nemo": (NEMO, TOWER), "tiny": (TINY, TINY_TOWER)}


def config_of(shape: str) -> ModelConfig:
    """A Pixtral of one of SHAPES: "nemo" is Pixtral-12B."""
    text, tower = SHAPES[shape]
    return read_config(
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "image_token_index": 10,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "text_config": {"model_type": "mistral", **text},
            "vision_config": {"model_type": "pixtral", "image_size": 1024, "patch_size": 16, **tower},
        }
    )


class RandomCheckpoint:
    """What `model.load` reads of a checkpoint whose tensors are all in the encoding that they are to have."""

    def __init__(self, config: ModelConfig, encoding: str, device: torch.device) -> None:
        self.device, self.folder, self.weight_paths = device, Path("random"), []
        shapes = {name: tuple(parameter.shape) for name, parameter in load.empty(config).named_parameters()}
        plain = {name: _info(name, shape, "bfloat16") for name, shape in shapes.items()}
        self.placement = place(plain, ENCODINGS[encoding])
        self.tensors: Mapping[str, TensorInfo] = {
            name: _info(name, shape, self.placement.encodings[name]) for name, shape in shapes.items()
        }

    def tensor(self, name: str) -> Tensor:
        """Ordinary numbers: norms of 1, biases of 0, else a normal distribution."""
        info = self.tensors[name]
        weight = torch.empty(info.shape, dtype=getattr(torch, info.encoding), device=self.device)
        if len(info.shape) == 1:
            return weight.fill_(not name.endswith("bias"))
        weight.normal_(0, STD)
        if name == HEAD:
            weight[SPOKEN:] = 0
        return weight

    def weight(self, name: str) -> Tensor | PackedRows | FP8 | NF4:
        """The same as it is stored."""
        info = self.tensors[name]
        if info.encoding in FLOATS:
            return self.tensor(name)
        rows, columns = info.shape
        if info.encoding == "nf4":
            return NF4(self._bytes(rows, columns // 2), self._units(rows * columns // 64, 2 * STD).float())
        if info.encoding == "fp8":
            codes = self._bytes(rows, columns)
            codes -= (codes & 127).eq(127).byte()  # those are no numbers
            return FP8(codes, self._units(rows, STD / 107).float()[:, None])
        encoding = ENCODINGS[info.encoding]
        blocks = self._bytes(rows, columns // encoding.block, encoding.block_bytes)
        for at, unit in SCALES[info.encoding].items():
            units = self._units(blocks.shape[0] * blocks.shape[1], unit).half().view(torch.uint8)
            blocks[..., at : at + 2] = units.view(*blocks.shape[:2], 2)
        return PackedRows(info.encoding, blocks.flatten(1))

    def release(self, name: str) -> None:
        """Nothing is mapped."""

    def _bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)

    def _units(self, count: int, middle: float) -> Tensor:
        """Scales around `middle`."""
        return middle * (0.5 + torch.rand(count, device=self.device))


SCALES: Mapping[str, Mapping[int, float]] = {
    "q4_0": {0: STD / 4.6},
    "q8_0": {0: STD / 74},
    "q4_k": {0: STD / 300, 2: STD / 40},
    "q6_k": {208: STD / (74 * 18)},
}
"""Where a block's float16 scales are, and what they are: STD over the spread of what they are multiplied with."""


def _info(name: str, shape: tuple[int, ...], encoding: str) -> TensorInfo:
    nbytes = prod(shape[:-1]) * ENCODINGS[encoding].row_bytes(shape[-1])
    return TensorInfo(name, ENCODINGS[encoding].word, shape, nbytes, Path("random"), encoding)


def random_model(checkpoint: RandomCheckpoint, config: ModelConfig) -> LanguageModel:
    """The model, loaded where its weights are made."""
    return load.load(checkpoint, config, checkpoint.placement, checkpoint.device)
