"""Token ids and pixels in, logits out: Pixtral (Llava) and, without a tower, plain Mistral.

Parameter names are ours (weights_cache.names maps every checkpoint's to them). Letters: N tokens, C hidden_size,
V vocab_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pixtral_cli.model.attention import Attend
from pixtral_cli.model.config import ModelConfig
from pixtral_cli.model.decoder import Decoder
from pixtral_cli.model.vision import Projector, VisionTower, to_patches


class Llava(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        text, vision = config.text, config.vision
        self.language_model = Decoder(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if vision is not None:
            self.vision_tower = VisionTower(vision)
            self.multi_modal_projector = Projector(vision.hidden_size, text.hidden_size, config.projector_bias)

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.norm.weight.device

    def encode_picture(self, pixels: Tensor) -> Tensor:
        """One picture, normalised pixels [3, height, width] -> features [rows * columns, C] for its [IMG] tokens."""
        assert self.config.vision is not None, "a text model has no vision tower"
        patches, grid = to_patches(pixels.to(self.device, self.dtype), self.config.vision.patch_size)
        return self.multi_modal_projector(self.vision_tower(patches, [grid]))

    def embed(self, token_ids: Tensor, features: Tensor | None = None) -> Tensor:
        """token_ids [N] -> [N, C]; `features` [M, C] replace the M image tokens among them, in order.

        Only [IMG] takes a feature; [IMG_BREAK] and [IMG_END] keep their embeddings.
        """
        x = self.language_model.embed_tokens(token_ids)
        if features is None:
            return x
        places = token_ids == self.config.image_token_id
        assert int(places.sum()) == len(features), (int(places.sum()), len(features))
        x[places] = features.to(x.dtype)
        return x

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Embedded tokens [N, C] at positions [N] -> hidden states [N, C]."""
        return self.language_model(x, positions, attend)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, C] -> float32 logits [N, V]."""
        return self.lm_head(hidden).float()
