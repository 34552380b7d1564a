"""The features of pictures, computed once and kept while there is room. Knows no prompts."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from pixtral_cli.engine.request import Picture
from pixtral_cli.model.language_model import LanguageModel


class PictureFeatures:
    """Features [rows * columns, C] by the picture's key and a salt; beyond `limit` bytes those unused for longest go.

    One that is larger than the limit is kept until the next comes: a prompt computed in chunks needs it again.
    """

    def __init__(self, model: LanguageModel, limit: int) -> None:
        self.model = model
        self.limit = limit
        self.nbytes = 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def of(self, picture: Picture, salt: bytes) -> Tensor:
        key = picture.key + salt
        features = self._kept.get(key)
        if features is None:
            features = self.model.encode_image(picture.pixels())
            self._make_room(features.nbytes)
            self._kept[key] = features
            self.nbytes += features.nbytes
        self._kept.move_to_end(key)
        return features

    def _make_room(self, nbytes: int) -> None:
        while self._kept and self.nbytes + nbytes > self.limit:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= oldest.nbytes
