"""Faults of a picture's looks, in steps of severity of which a higher one is worse: order that nobody has to judge.

| corruption | what is done to the picture |
|---|---|
| blur | Gaussian blur |
| noise | normal noise on every channel |
| low_contrast | every channel towards the picture's mean |
| oversaturation | channels away from luma, clipped |
| color_cast | a keyed constant added to the channels, of sum zero |
| grid | a fine pattern of alternating brightness, as reinforcement learning leaves on skin and sky |
| jpeg | JPEG at a low quality: blocks of 8 px |
| patches | squares of 16 px, a latent's cell, each a little off in colour, as a model leaves them that has trained too little |
| bands | horizontal bands of brightness |
| shift | the picture moved to the right and down, wrapped around: no fault of looks, but of an edit that is to leave all in its place |
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

from model_core.data.keys import keyed_generator
from model_core.recipe import CompressionRatio

MAX_SEVERITY = 4
BEST_SCORE = 5.0
AESTHETIC = ("blur", "noise", "low_contrast", "oversaturation", "color_cast", "grid", "jpeg", "patches", "bands")
LUMA = np.array((0.299, 0.587, 0.114))  # Rec. 601

# One entry a severity, 1 to 4. Lengths are pixels on a picture of 64, levels are of 255.
BLUR_RADIUS = (0.7, 1.2, 2.0, 3.2)
NOISE_SIGMA = (9.0, 18.0, 34.0, 58.0)
CONTRAST = (0.72, 0.5, 0.32, 0.18)
SATURATION = (1.4, 1.9, 2.7, 4.0)
CAST = (12.0, 24.0, 42.0, 66.0)
GRID = (8.0, 16.0, 28.0, 46.0)
JPEG_QUALITY = (30, 15, 8, 4)
PATCHES = (5.0, 10.0, 18.0, 30.0)
BANDS = (10.0, 20.0, 34.0, 54.0)
SHIFT = (2.0, 4.0, 7.0, 11.0)

CASTS = ((1, -0.5, -0.5), (-1, 0.5, 0.5), (-0.5, 1, -0.5), (0.5, -1, 0.5), (-0.5, -0.5, 1), (0.5, 0.5, -1))
BAND_PERIOD = (8.0, 20.0)  # pixels on 64


def score_of(severity: int) -> float:
    """The pointwise score of a picture with a fault of `severity`: 5 without one, 1 for the worst."""
    return max(1.0, BEST_SCORE - severity)


def corrupt(picture: Image.Image, kind: str, severity: int, *key: object) -> Image.Image:
    """The RGB picture with a corruption of severity 0 (none) to 4; one `key` gives one pattern, which grows with severity.

    Raises ValueError for an unknown corruption or severity.
    """
    if not 0 <= severity <= MAX_SEVERITY:
        raise ValueError(f"found severity {severity}; allowed is 0 to {MAX_SEVERITY}")
    if severity == 0:
        return picture
    level = severity - 1
    scale = max(picture.size) / 64
    generator = keyed_generator(*key, "corruption", kind)
    if kind == "blur":
        return picture.filter(ImageFilter.GaussianBlur(BLUR_RADIUS[level] * scale))
    if kind == "jpeg":
        return _jpeg(picture, JPEG_QUALITY[level])
    pixels: np.ndarray = np.asarray(picture, dtype=np.float32)
    height, width = pixels.shape[:2]
    if kind == "noise":
        pixels = pixels + NOISE_SIGMA[level] * generator.standard_normal(pixels.shape, dtype=np.float32)
    elif kind == "low_contrast":
        mean = pixels.mean(axis=(0, 1))
        pixels = mean + (pixels - mean) * CONTRAST[level]
    elif kind == "oversaturation":
        luma = (pixels @ LUMA)[..., None]
        pixels = luma + (pixels - luma) * SATURATION[level]
    elif kind == "color_cast":
        pixels = pixels + CAST[level] * np.array(CASTS[int(generator.integers(len(CASTS)))])
    elif kind == "grid":
        cell = max(1, round(int(generator.integers(1, 3)) * scale))
        rows, columns = np.arange(height)[:, None] // cell, np.arange(width)[None] // cell
        pixels = pixels + GRID[level] * np.where((rows + columns) % 2, 1.0, -1.0)[..., None]
    elif kind == "patches":
        cells = generator.standard_normal((-(-height // CompressionRatio), -(-width // CompressionRatio), 3))
        pixels = pixels + PATCHES[level] * cells.repeat(CompressionRatio, axis=0).repeat(CompressionRatio, axis=1)[:height, :width]
    elif kind == "bands":
        period, phase = generator.uniform(*BAND_PERIOD) * scale, generator.uniform(0, 2 * np.pi)
        pixels = pixels + BANDS[level] * np.sin(2 * np.pi * np.arange(height) / period + phase)[:, None, None]
    elif kind == "shift":
        pixels = np.roll(pixels, (round(SHIFT[level] * scale),) * 2, axis=(0, 1))
    else:
        raise ValueError(f"found corruption {kind!r}; allowed are {', '.join((*AESTHETIC, 'shift'))}")
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def rms_difference(one: Image.Image, other: Image.Image) -> float:
    """Root mean square difference of two RGB pictures of one size, in levels of 255."""
    first, second = (np.asarray(picture, dtype=np.float32) for picture in (one, other))
    return float(np.sqrt(np.mean((first - second) ** 2)))


def _jpeg(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")
