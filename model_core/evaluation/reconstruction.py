"""PSNR and SSIM by one fixed protocol, because projects differ by more than most claimed gains.

Both take uint8 RGB pictures (B, 3, H, W), clamped and rounded, and give one number a picture; scores are means over pictures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, peak 255: (B,). Equal pictures score infinity."""
    error = (images.double() - targets.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255.0**2 / error)


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) on values in [0, 1], 11 x 11 Gaussian window of sigma 1.5, no padding: (B,)."""
    x, y = images.double() / 255, targets.double() / 255
    if min(x.shape[-2:]) < WINDOW:
        raise ValueError(f"sides {tuple(x.shape[-2:])} are smaller than the window of {WINDOW}")
    place = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    line = torch.exp(-place.square() / (2 * SIGMA**2))
    line /= line.sum()
    kernel = (line[:, None] * line[None])[None, None].expand(x.shape[1], 1, WINDOW, WINDOW)

    def blur(values: Tensor) -> Tensor:
        return F.conv2d(values, kernel, groups=values.shape[1])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x.square(), blur(y * y) - mean_y.square()
    covariance = blur(x * y) - mean_x * mean_y
    score = (2 * mean_x * mean_y + C1) * (2 * covariance + C2) / ((mean_x.square() + mean_y.square() + C1) * (var_x + var_y + C2))
    return score.mean(dim=(1, 2, 3))
