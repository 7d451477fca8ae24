"""MSRoPE: rotary positions of text and pictures on three axes, frame, height and width (Qwen-Image report 2.4).

A picture's grid is centred at zero on height and width, and its frame is its ordinal: 0 for the target, 1, 2, ... for the
condition images. Text token i has one index on all three axes (it lies on the diagonal), beginning where the largest grid
ends, so that text behaves as one-dimensional RoPE and never shares a place with a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def image_positions(frame: int, height: int, width: int) -> Tensor:
    """Positions of a (height, width) grid of tokens, row by row: (height width, 3) int64."""
    rows = torch.arange(height) - (height - height // 2)
    columns = torch.arange(width) - (width - width // 2)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.cat((torch.full((height * width, 1), frame), grid), dim=1)


def text_positions(length: int, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Positions of `length` text tokens beside pictures of the given token shapes: (length, 3) int64."""
    start = max(max(height // 2, width // 2) for height, width in shapes)
    return torch.arange(start, start + length)[:, None].expand(length, 3)


def rotary_table(positions: Tensor, *, axes: Sequence[int], theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (N, sum(axes) / 2), of positions (N, 3): axis a has axes[a] / 2 frequencies theta^(-2i / axes[a])."""
    angles = []
    for axis, dim in enumerate(axes):
        frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
        angles.append(positions[:, axis, None].double() * frequencies)
    angle = torch.cat(angles, dim=1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns adjacent channel pairs of x (B, heads, N, head dim) by the table's angles, in fp32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)
