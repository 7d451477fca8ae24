"""Layers of the autoencoder: pixels folded into channels and back, norms, residual blocks, resampling.

Legend: B batch, C channels, H and W height and width of the grid at hand.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fold(x: Tensor, factor: int) -> Tensor:
    """Space to channels: (B, C, H, W) to (B, C factor^2, H / factor, W / factor), the place within a patch fastest."""
    return x if factor == 1 else F.pixel_unshuffle(x, factor)


def unfold(x: Tensor, factor: int) -> Tensor:
    """Channels to space, the inverse of `fold`."""
    return x if factor == 1 else F.pixel_shuffle(x, factor)


def group_mean(x: Tensor, num_channels: int) -> Tensor:
    """(B, C, H, W) to (B, num_channels, H, W): the mean of each group of neighbouring channels (DC-AE 3.1)."""
    batch, _, height, width = x.shape
    return x.reshape(batch, num_channels, -1, height, width).mean(2)


def repeat_channels(x: Tensor, num_channels: int) -> Tensor:
    """(B, C, H, W) to (B, num_channels, H, W): each channel repeated, so that `group_mean` undoes it (DC-AE 3.1)."""
    return x.repeat_interleave(num_channels // x.shape[1], dim=1)


def shortcut_down(x: Tensor, num_channels: int, *, factor: int, temporal: bool) -> Tensor:
    """(B, C, H, W) to (B, num_channels, H / factor, W / factor): patches folded into channels, and group means of those.

    `temporal`: as a video autoencoder that folds two frames treats a single picture, before which it puts a frame of zeros (S).
    """
    folded = fold(x, factor)
    if temporal:
        frames = folded.unflatten(1, (x.shape[1], factor**2))
        folded = torch.stack((torch.zeros_like(frames), frames), dim=2).flatten(1, 3)
    return group_mean(folded, num_channels)


def shortcut_up(x: Tensor, num_channels: int, *, temporal: bool) -> Tensor:
    """(B, C, H, W) to (B, num_channels, 2 H, 2 W): channels repeated and unfolded; `temporal`: the second of two frames of that (S)."""
    if not temporal:
        return unfold(repeat_channels(x, 4 * num_channels), 2)
    frames = repeat_channels(x, 8 * num_channels).unflatten(1, (num_channels, 2, 4))
    return unfold(frames[:, :, 1].flatten(1, 2), 2)


def group_size(many: int, few: int, where: str) -> int:
    """How many of `many` channels share one of `few`; raises ValueError when that is not a whole number."""
    if many % few:
        raise ValueError(f"{where}: {many} channels do not fall into {few} equal groups")
    return many // few


class ChannelRMSNorm(nn.Module):
    """x / ||x|| sqrt(C) gamma over the channels of each place, without a bias (public code of Qwen-Image-2.1).

    `eps` is added to the mean square: it keeps gradients finite where all channels are near zero.
    """

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        # Channels-last memory makes this view contiguous, so the norm reads neighbours.
        normed: Tensor = F.rms_norm(x.movedim(1, -1), self.gamma.shape, self.gamma, eps=self.eps)
        return normed.movedim(-1, 1)


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, added to the input; 1x1 convolution on the way past when the width changes."""

    def __init__(self, dim_in: int, dim_out: int, *, norm_eps: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = ChannelRMSNorm(dim_in, eps=norm_eps), unit(nn.Conv2d(dim_in, dim_out, 3, padding=1))
        self.norm2, self.conv2 = ChannelRMSNorm(dim_out, eps=norm_eps), zero(nn.Conv2d(dim_out, dim_out, 3, padding=1))
        self.skip = nn.Identity() if dim_in == dim_out else unit(nn.Conv2d(dim_in, dim_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim_in, H, W) to (B, dim_out, H, W)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        change: Tensor = self.conv2(F.silu(self.norm2(hidden)))
        skipped: Tensor = self.skip(x)
        return skipped + change


class SpatialAttention(nn.Module):
    """Single-head self-attention over all places, added to the input; it makes the result depend on the whole picture."""

    def __init__(self, dim: int, *, norm_eps: float) -> None:
        super().__init__()
        self.norm, self.qkv = ChannelRMSNorm(dim, eps=norm_eps), unit(nn.Conv2d(dim, 3 * dim, 1))
        self.out = zero(nn.Conv2d(dim, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        query, key, value = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value)[:, 0].transpose(1, 2)
        mixed: Tensor = self.out(attended.reshape(x.shape))
        return x + mixed


class GatedMixer(nn.Module):
    """x + GLU(1x1 convolution): channels mixed at the low resolution, beside each resampling.

    It stands where the successor's video trunk has 1x1 temporal convolutions that are idle on a single picture, and brings
    the parameters to the published 79 M and 259 M (R1 Table 1).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = zero(nn.Conv2d(dim, 2 * dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        mixed: Tensor = F.glu(self.conv(x), dim=1)
        return x + mixed


class Downsample(nn.Module):
    """Half the resolution: 3x3 convolution with stride 2, padded on the right and at the bottom."""

    def __init__(self, dim: int, *, mixer: bool) -> None:
        super().__init__()
        self.conv, self.mixer = unit(nn.Conv2d(dim, dim, 3, stride=2)), GatedMixer(dim) if mixer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H / 2, W / 2)."""
        mixed: Tensor = self.mixer(self.conv(F.pad(x, (0, 1, 0, 1))))
        return mixed


class Upsample(nn.Module):
    """Twice the resolution: each place repeated 2x2, then a 3x3 convolution."""

    def __init__(self, dim: int, *, mixer: bool) -> None:
        super().__init__()
        self.mixer, self.conv = GatedMixer(dim) if mixer else nn.Identity(), unit(nn.Conv2d(dim, dim, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2 H, 2 W)."""
        convolved: Tensor = self.conv(F.interpolate(self.mixer(x), scale_factor=2.0, mode="nearest"))
        return convolved


def unit(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution with weights that keep the variance of white input (LeCun), so that what passes is as large as what is added.

    PyTorch's default lets a third of the variance through; after a few such layers, the branches behind norms drown the rest.
    """
    nn.init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def zero(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution with weights and bias zero: a branch that says nothing at first."""
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def cosine_basis(num: int, size: int) -> tuple[Tensor, Tensor]:
    """The lowest orthonormal cosine patterns (num, 3, size, size) of a colour patch, and their frequencies (num,).

    Rows are DCT-II patterns times an orthonormal colour axis: luma (1, 1, 1) / sqrt(3), (1, 0, -1) / sqrt(2), (1, -2, 1) /
    sqrt(6). Each chroma axis has one in seven patterns, as JPEG and the eye keep less of it. Sorted by frequency, luma first.
    """
    place, frequency = torch.arange(size, dtype=torch.float64), torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi * (place[None] + 0.5) * frequency[:, None] / size) * math.sqrt(2.0 / size)
    waves[0] /= math.sqrt(2.0)
    axes = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]], dtype=torch.float64)
    axes /= axes.norm(dim=1, keepdim=True)
    order = sorted(((row, column) for row in range(size) for column in range(size)), key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, pair))
    chroma = num // 7
    rows: list[Tensor] = []
    frequencies: list[float] = []
    for axis, count in zip(axes, (num - 2 * chroma, chroma, chroma), strict=True):
        rows += [axis[:, None, None] * waves[row][:, None] * waves[column][None] for row, column in order[:count]]
        frequencies += [math.hypot(row, column) for row, column in order[:count]]
    return torch.stack(rows).float(), torch.tensor(frequencies)
