"""Large pictures through the autoencoder in overlapping tiles: memory for one tile, at the price of a seam.

Each tile is wrong near its cut sides, where convolutions see zeros in place of neighbours. So the outer quarter of an overlap is
dropped on either side, and the two tiles are blended linearly over the half between. Without attention, tiles whose quarter overlap
spans a convolution's whole reach give what the picture as a whole gives; attention sees one tile at a time, and always leaves a seam.

Legend: B batch, C latent channels, h and w sides of the latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from model_core.models.vae import ResidualVAE
from model_core.recipe import CompressionRatio

RGB = 3
LARGE_PX = 2048  # a picture with a side of so many px or more passes in tiles
TILE_PX, OVERLAP_PX = 1152, 256  # 2048 px are two tiles


def encode_pictures(vae: ResidualVAE, images: Tensor) -> Tensor:
    """Raw latents (B, C, h, w) of RGB pictures (B, 3, H, W) in [-1, 1]; large ones in tiles. RGB is opaque to a model of RGBA."""
    images = opaque(images, channels=vae.config.pixel_channels)
    if max(images.shape[2:]) < LARGE_PX:
        return vae.encode(images)
    return encode_tiled(vae, images, tile_px=TILE_PX, overlap_px=OVERLAP_PX)


def decode_pictures(vae: ResidualVAE, latents: Tensor) -> Tensor:
    """RGB pictures (B, 3, H, W), not clamped, of raw latents (B, C, h, w); large ones in tiles."""
    if max(latents.shape[2:]) * CompressionRatio < LARGE_PX:
        return vae.decode(latents)[:, :RGB]
    return decode_tiled(vae, latents, tile_px=TILE_PX, overlap_px=OVERLAP_PX)[:, :RGB]


def opaque(images: Tensor, *, channels: int) -> Tensor:
    """Pictures (B, 3, H, W) with as many channels as a model has: an alpha of 1 is put behind RGB."""
    batch, found, height, width = images.shape
    return torch.cat((images, images.new_ones(batch, channels - found, height, width)), dim=1) if channels > found else images


def encode_tiled(vae: ResidualVAE, images: Tensor, *, tile_px: int, overlap_px: int) -> Tensor:
    """What `vae.encode` gives of pictures (B, P, H, W), in tiles: exactly so where the picture is no larger than a tile.

    Raises ValueError for sizes that are not multiples of 16 px, or an overlap that leaves a tile nothing of its own.
    """
    return _in_tiles(vae.encode, images, tile=tile_px, overlap=overlap_px, unit=CompressionRatio, scale=1 / CompressionRatio)


def decode_tiled(vae: ResidualVAE, latents: Tensor, *, tile_px: int, overlap_px: int) -> Tensor:
    """What `vae.decode` gives of raw latents (B, C, h, w), in tiles; exactness and errors as with `encode_tiled`."""
    tile, overlap = tile_px / CompressionRatio, overlap_px / CompressionRatio
    return _in_tiles(vae.decode, latents, tile=tile, overlap=overlap, unit=1, scale=CompressionRatio)


def _in_tiles(work: Callable[[Tensor], Tensor], x: Tensor, *, tile: float, overlap: float, unit: int, scale: float) -> Tensor:
    """`work` on tiles of `x`, blended. `tile` and `overlap` count places of `x`; `scale` is the output's places for each of them."""
    if tile % unit or overlap % unit or not 0 <= overlap < tile:
        raise ValueError(
            f"found tiles of {tile / unit:g} latent places that overlap by {overlap / unit:g}; allowed are multiples of"
            f" {CompressionRatio} px and an overlap below the tile"
        )
    height, width = x.shape[2:]
    if max(height, width) <= tile:
        return work(x)
    rows, columns = (_spans(side, int(tile), int(overlap), unit) for side in (height, width))
    blended, weights = None, torch.zeros(round(height * scale), round(width * scale), dtype=x.dtype, device=x.device)
    for row in rows:
        for column in columns:
            part = work(x[:, :, slice(*row), slice(*column)])
            if blended is None:
                blended = part.new_zeros(*part.shape[:2], *weights.shape)
            (top, bottom), (left, right) = ((round(side * scale) for side in span) for span in (row, column))
            reach = round(overlap * scale)
            weight = torch.outer(
                _ramp(top, bottom, weights.shape[0], reach).to(weights), _ramp(left, right, weights.shape[1], reach).to(weights)
            )
            blended[:, :, top:bottom, left:right] += part * weight
            weights[top:bottom, left:right] += weight
    assert blended is not None
    return blended / weights


def _spans(side: int, tile: int, overlap: int, unit: int) -> list[tuple[int, int]]:
    """(begin, end) of the fewest tiles that cover `side` places with at least that overlap, evenly laid out."""
    if side <= tile:
        return [(0, side)]
    count = math.ceil((side - overlap) / (tile - overlap))
    begins = [index * (side - tile) // (count - 1) // unit * unit for index in range(count)]
    return [(begin, begin + tile) for begin in begins]


def _ramp(begin: int, end: int, side: int, overlap: int) -> Tensor:
    """Weights (end - begin,) of a tile: 0 in the outer quarter of an overlap, 1 past it, linear over the half between."""
    place = torch.arange(end - begin, dtype=torch.float64) + 0.5
    inner = torch.full_like(place, math.inf)
    if begin > 0:
        inner = torch.minimum(inner, place)
    if end < side:
        inner = torch.minimum(inner, end - begin - place)
    return ((inner - overlap / 4) / (overlap / 2)).clamp(0, 1) if overlap else torch.ones_like(place)
