"""Serialized files as earlier releases wrote them: packed matrices in the orders of 4-bit kernels for CPUs."""

from types import SimpleNamespace
from unittest.mock import patch

import gguf
import torch

from weights_cache.codecs.nf4 import NF4
from weights_cache.encodings import ENCODINGS
from weights_cache.formats import serialized_writer
from weights_cache.formats.serialized import Manifest, SerializedFile
from weights_cache.formats.serialized_writer import Weight
from weights_cache.names import EMBEDDING
from weights_cache.packed import PackedRows

TYPES = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q4_k": gguf.GGMLQuantizationType.Q4_K}
HEADERS = {"q4_0": (2, 2), "q4_k": (16, 4)}  # bytes of scales in a block, and those of a word
TOGETHER = {"q4_0": 64, "q4_k": 64, "nf4": 32}


def codes_of(weight):
    """int32 [R, C]: the 4-bit codes, as gguf-py and bitsandbytes' documentation have them."""
    if isinstance(weight, NF4):
        return torch.stack([weight.codes >> 4, weight.codes & 0xF], 2).flatten(1).int()
    blocks = weight.rows.clone().view(-1, ENCODINGS[weight.encoding].block_bytes)
    blocks[:, :2] = torch.tensor([1.0], dtype=torch.float16).view(torch.uint8)
    if weight.encoding == "q4_k":  # every scale 1, and offsets of no size
        blocks[:, 2:4] = 0
        blocks[:, 4:16] = torch.tensor([1] * 4 + [0] * 4 + [1] * 4, dtype=torch.uint8)
    decoded = gguf.quants.dequantize(blocks.view(weight.rows.shape).numpy(), TYPES[weight.encoding])
    return torch.from_numpy(decoded).int() + (8 if weight.encoding == "q4_0" else 0)


def ordered(weight):
    """The parts of a packed matrix in the order of a kernel for CPUs."""
    codes = codes_of(weight).to(torch.uint8)
    if isinstance(weight, NF4):
        rows = codes.view(-1, 2, 16, weight.shape[1] // 2, 2)  # the halves of a byte, rows, pairs of columns
        low, high = rows.permute(1, 0, 3, 2, 4).flatten(3)  # byte 2 j + column of the pair
        return {**weight.tensors(), "codes": low | high << 4}
    low, high = codes.view(-1, 2, 32, weight.shape[1]).transpose(2, 3).unbind(1)
    header, word = HEADERS[weight.encoding]
    words = weight.rows.unflatten(1, (-1, ENCODINGS[weight.encoding].block_bytes))[..., :header]
    return {"codes": low | high << 4, "scales": words.unflatten(2, (-1, word)).permute(1, 2, 0, 3).contiguous()}


def fits(name, weight):
    """Whether earlier releases wrote a weight in such an order."""
    return (
        isinstance(weight, PackedRows | NF4)
        and name != EMBEDDING
        and weight.encoding in TOGETHER
        and weight.shape[0] % TOGETHER[weight.encoding] == 0
    )


def write(path, today, version=2, change=lambda name, parts: parts):
    """At `path` the model in the file `today` as it was written in `version`; `change` may alter a matrix's parts."""
    file = SerializedFile(today)
    orders = {1: {"nf4"}, 2: TOGETHER.keys()}[version]

    def weight_of(name, info):
        weight = file.weight(name)
        parts = {"": weight} if isinstance(weight, torch.Tensor) else weight.tensors()
        if fits(name, weight) and weight.encoding in orders:
            parts = change(name, ordered(weight))
        kinds = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()}
        return Weight(name, info.encoding, info.shape, kinds, lambda: SimpleNamespace(tensors=lambda: parts))

    manifest = file.manifest
    with patch.object(serialized_writer, "Manifest", lambda *told: Manifest(*told, version=version)):
        serialized_writer.write(
            path,
            [weight_of(name, info) for name, info in file.tensors.items()],
            {name: file.read(name) for name in file.file_names},
            model=manifest.model,
            form=manifest.form,
            encoding=manifest.encoding,
        )
