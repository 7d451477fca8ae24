"""Between pictures and tensors: RGB bytes and float32 in [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def on_white(image: Image.Image) -> Image.Image:
    """The RGB picture, on white where it is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layer).convert("RGB")


def image_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [-1, 1]; what is transparent lies on white."""
    return torch.from_numpy(np.array(on_white(image))).permute(2, 0, 1).float() / 127.5 - 1


def image_bytes(images: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 of pictures in [-1, 1]: clamped and rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def tensor_image(image: Tensor) -> Image.Image:
    """The RGB picture of (3, H, W) in [-1, 1]."""
    return Image.fromarray(image_bytes(image).permute(1, 2, 0).contiguous().numpy())
