"""Perceptual hash: 64 signs of low frequencies of luma, nearly equal for pictures that look alike (Zauner 2010)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

SIDE = 32
LOW = 8


def perceptual_hash(image: Image.Image) -> int:
    """64 bits of the lowest 8 x 8 DCT coefficients of the 32 x 32 grey picture, each against their median."""
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    basis = _dct_basis()
    low = (basis @ grey @ basis.T).ravel()
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def distance(first: int, second: int) -> int:
    """Number of differing bits."""
    return (first ^ second).bit_count()


@lru_cache(maxsize=1)
def _dct_basis() -> np.ndarray:
    """The first LOW rows of the DCT-II matrix: (LOW, SIDE)."""
    frequency, place = np.arange(LOW)[:, None], np.arange(SIDE)[None]
    return np.cos(np.pi * frequency * (2 * place + 1) / (2 * SIDE))
