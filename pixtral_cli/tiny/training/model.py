"""The untrained built-in model, and the attention masks of its training batches.

Letters: B sequences or pictures, T tokens of each, N = B * T, H heads, K key-value heads, D head_dim.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pixtral_cli.model.families import pixtral, read_config
from pixtral_cli.model.vision import VisionLanguageModel
from pixtral_cli.tiny.training.batches import PATCH
from pixtral_cli.tiny.training.tokenizer import IMG, VOCABULARY

CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "dtype": "bfloat16",
    "image_token_index": IMG,
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 11,
    "text_config": {
        "model_type": "mistral",
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 11,
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 64,
        "num_channels": 3,
        "image_size": 1024,
        "patch_size": PATCH,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def new_model(seed: int) -> VisionLanguageModel:
    """The built-in model before training: normal(0.02..), residual outputs scaled down by depth."""
    torch.manual_seed(seed)
    model = pixtral.build(read_config(CONFIG))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            (nn.init.zeros_ if name.endswith("bias") else nn.init.ones_)(parameter)
        else:
            fan_in = parameter[0].numel()
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=0.02 if "embed" in name else fan_in**-0.5 * (0.35 if residual else 1.0))
    return model


class AttendInBatch:
    """Every token sees the shared tokens and those of its own group before it; groups int [B, T]."""

    def __init__(self, groups: Tensor, dtype: torch.dtype) -> None:
        self.batch, length = groups.shape
        same = groups[:, :, None] == groups[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool, device=groups.device).tril()
        seen = (same | (groups == 0)[:, None, :]) & causal
        self.bias = torch.zeros(seen.shape, dtype=dtype, device=groups.device).masked_fill_(~seen, float("-inf"))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, self.batch, self.bias[:, None])


class AttendPictures:
    """Equal-sized pictures: every patch sees the patches of its own picture."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, self.batch, None)


def _attend(q: Tensor, k: Tensor, v: Tensor, batch: int, bias: Tensor | None) -> Tensor:
    """q [N, H, D], k, v [N, K, D] -> [N, H, D]; spelled out on a CPU, where its backward pass is twice as quick."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, T, D]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v)) if group > 1 else (k, v)
    if q.is_cuda:
        return scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(0, 1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, T, T]
    scores = scores if bias is None else scores + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)


class QuickNorm(nn.RMSNorm):
    """nn.RMSNorm over the last axis of [N, C], with its gradient written out instead of traced."""

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self.eps)


def quicken_norms(model: nn.Module) -> None:
    """Turn every nn.RMSNorm of `model` into a QuickNorm; the weights stay."""
    for module in model.modules():
        if type(module) is nn.RMSNorm:
            module.__class__ = QuickNorm


class _Norm(torch.autograd.Function):
    """y = w n with n = x r and r = 1 / sqrt(mean(x^2) + eps); dx = r (w dy - n mean(w dy n)), dw = sum(dy n)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        r = (length.square_() / x.shape[-1] + eps).rsqrt_().to(x.dtype)  # [N, 1]
        n = x * r
        ctx.save_for_backward(n, r, weight)
        return n * weight

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        n, r, weight = ctx.saved_tensors
        product = dy * n
        mean = product @ weight[:, None] / n.shape[-1]  # [N, 1]
        dx = torch.addcmul(dy * weight, n, mean, value=-1).mul_(r)
        return dx, (product.new_ones(1, len(product)) @ product)[0], None
