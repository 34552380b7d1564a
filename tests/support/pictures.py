"""Pictures of noise, and conversations about them."""

import torch
from PIL import Image


def noise(width, height, seed=0):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def conversation(*pictures, text="what is in the picture? où ça 🙂 12"):
    images = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
