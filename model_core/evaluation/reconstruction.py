"""How well pictures survive the autoencoder: PSNR and SSIM by one fixed protocol, since repositories differ.

Pictures are clamped and rounded to 8-bit RGB; each score is taken a picture, then averaged by the caller.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model_core.data.pixels import image_bytes

PEAK = 255.0
MAX_PSNR_DB = 100.0  # of two equal pictures, so that a mean stays finite
WINDOW, SIGMA = 11, 1.5  # SSIM's Gaussian window in px (Wang et al. 2004)
K1, K2 = 0.01, 0.03


def psnr(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """(B,) in dB for pictures (B, 3, H, W) in [-1, 1]: 10 log10(255^2 / MSE) over all pixels and channels, at most 100."""
    difference = image_bytes(reconstructions).double() - image_bytes(originals).double()
    decibels = 10 * torch.log10(PEAK**2 / difference.square().mean(dim=(1, 2, 3)))
    return decibels.clamp(max=MAX_PSNR_DB)


def ssim(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """(B,) for pictures (B, 3, H, W) in [-1, 1], computed on 0..1: 11x11 Gaussian of sigma 1.5, no padding, mean over channels.

    Raises ValueError for sides below the window's.
    """
    if min(originals.shape[2:]) < WINDOW:
        raise ValueError(f"found pictures of {originals.shape[2]} x {originals.shape[3]} px; SSIM's window needs {WINDOW} px a side")
    x, y = (image_bytes(images).double() / PEAK for images in (reconstructions, originals))
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return similarity.mean(dim=(1, 2, 3))


def _blur(images: Tensor) -> Tensor:
    """Gaussian mean around every pixel whose window lies inside the picture."""
    offsets = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    weights /= weights.sum()
    channels = images.shape[1]
    window = weights.expand(channels, 1, 1, WINDOW)
    return F.conv2d(F.conv2d(images, window.transpose(2, 3), groups=channels), window, groups=channels)
