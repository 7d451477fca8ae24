"""Aspect buckets: every picture of a stage goes to one of a few shapes near the stage's pixel budget."""

from __future__ import annotations

import math
from functools import lru_cache

from PIL import Image

from model_core.recipe import CompressionRatio

RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))  # width : height; Qwen-Image 1.0's set without 3:1


@lru_cache(maxsize=64)
def bucket_shapes(resolution_px: int, *, multiple_px: int = CompressionRatio) -> tuple[tuple[int, int], ...]:
    """(height, width) of each bucket: sides in `multiple_px`, with an area near the square of `resolution_px`, none twice."""
    shapes = []
    for width, height in RATIOS:
        scale = resolution_px / math.sqrt(width * height)
        sides = tuple(max(1, round(side * scale / multiple_px)) * multiple_px for side in (height, width))
        shapes.append((sides[0], sides[1]))
    return tuple(dict.fromkeys(shapes))


def bucket(width_px: int, height_px: int, resolution_px: int, *, multiple_px: int = CompressionRatio) -> tuple[int, int]:
    """(height, width) of the bucket whose aspect ratio is nearest, on a log scale, to the picture's."""
    ratio = math.log(height_px / width_px)
    return min(bucket_shapes(resolution_px, multiple_px=multiple_px), key=lambda shape: abs(math.log(shape[0] / shape[1]) - ratio))


def fit(image: Image.Image, shape_px: tuple[int, int]) -> Image.Image:
    """The picture scaled to cover (height, width) and cropped to it at the centre."""
    height, width = shape_px
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return resized.crop((left, top, left + width, top + height))
