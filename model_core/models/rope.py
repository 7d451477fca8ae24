"""MSRoPE: rotary positions of text and pictures on three axes, frame, height and width (Qwen-Image report 2.4).

A picture's grid is centred at zero on height and width, and lies in one frame. A text token has one index on all three axes
(it lies on the diagonal), so that text behaves as one-dimensional RoPE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model_core.models.segments import Segment


def sample_positions(sample: Sequence[Segment], *, scheme: Literal["ordinal", "running"]) -> np.ndarray:
    """Positions (S, 3) int64 of a sample: text runs (their lengths) and pictures (h, w), of which the last is the target.

    `ordinal` (code of Qwen-Image 1.0): a picture's frame is its ordinal, 0 for the target and 1, 2, ... for the condition images;
    text counts on through all runs from where the largest grid ends, so that it never shares a place with a pixel. `running`
    (code of Qwen-Image-2.1): one counter p along the sample; a text token takes p and adds 1, a picture lies in frame p and adds
    the longer of its sides.
    """
    pictures = [segment for segment in sample if not isinstance(segment, int)]
    counter = 0 if scheme == "running" else max((max(height // 2, width // 2) for height, width in pictures), default=0)
    ordinal, parts = 0, []
    for segment in sample:
        if isinstance(segment, int):
            parts.append(np.repeat(np.arange(counter, counter + segment), 3).reshape(-1, 3))
            counter += segment
            continue
        ordinal += 1
        if scheme == "running":
            parts.append(grid_positions(counter, *segment))
            counter += max(segment)
        else:
            parts.append(grid_positions(ordinal % len(pictures), *segment))
    return np.concatenate(parts)


def grid_positions(frame: int, height: int, width: int) -> np.ndarray:
    """Positions of a (height, width) grid of tokens, row by row: (height width, 3) int64."""
    rows, columns = (np.arange(side) - (side - side // 2) for side in (height, width))
    return np.stack(np.broadcast_arrays(frame, rows[:, None], columns[None]), axis=-1).reshape(-1, 3)


def rotary_table(positions: Tensor, *, axes: Sequence[int], theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (N, sum(axes) / 2), of positions (N, 3): axis a has axes[a] / 2 frequencies theta^(-2i / axes[a])."""
    angles = []
    for axis, dim in enumerate(axes):
        frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
        angles.append(positions[:, axis, None].double() * frequencies)
    angle = torch.cat(angles, dim=1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns adjacent channel pairs of x (N, heads, head dim) by the table's angles (N, head dim / 2), in fp32."""
    pairs, cos, sin = x.float().unflatten(-1, (-1, 2)), cos[:, None], sin[:, None]
    if not x.is_cuda and not torch.compiler.is_compiling():  # one pass over memory; torch.compile fuses the real form alone
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(-2).type_as(x)
    even, odd = pairs.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)
