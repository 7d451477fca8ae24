"""Losses of the autoencoder: reconstruction, and alignment of the latent with a frozen teacher's features. No GAN, no KL (R1, R2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def edge_loss(images: Tensor, targets: Tensor) -> Tensor:
    """L1 between the horizontal and vertical differences of (B, 3, H, W) pictures: the sharpness that plain L1 forgives."""
    across = (images.diff(dim=3) - targets.diff(dim=3)).abs().mean()
    down = (images.diff(dim=2) - targets.diff(dim=2)).abs().mean()
    return 0.5 * (across + down)


def alignment_loss(latents: Tensor, features: Tensor, *, margin_cos: float, margin_dist: float) -> Tensor:
    """How far projected latents (B, C, h, w) are from frozen features (B, C, h, w), beyond two margins (R2 4.2, VA-VAE 3.2).

    mcos = mean_p ReLU(1 - cos(z_p, f_p) - margin_cos); mdms = mean_pq ReLU(|cos(z_p, z_q) - cos(f_p, f_q)| - margin_dist),
    p and q over the places of one picture; the result is their sum.
    """
    z, f = (F.normalize(x.flatten(2).transpose(1, 2), dim=-1) for x in (latents, features))
    pointwise = F.relu(1 - (z * f).sum(dim=-1) - margin_cos).mean()
    pairwise = F.relu((z @ z.transpose(1, 2) - f @ f.transpose(1, 2)).abs() - margin_dist).mean()
    return pointwise + pairwise


def relaxed(progress: float, *, strict: tuple[float, float], loose: tuple[float, float]) -> tuple[float, float]:
    """(m_cos, m_dist) at `progress` in [0, 1]: linear from strict to loose (R1: alignment strong early, gradually relaxed)."""
    return strict[0] + progress * (loose[0] - strict[0]), strict[1] + progress * (loose[1] - strict[1])


def gradient_features(images: Tensor, *, cell_px: int) -> Tensor:
    """A teacher that needs no weights: what is in each cell of (B, 3, H, W) pictures, as (B, 15, H / cell, W / cell).

    Mean and spread of each colour (6), and a histogram of gradient orientations weighted by strength in eight signed
    directions (Dalal and Triggs 2005) with its total (9). It stands where a recipe names no DINOv2 folder.
    """
    grey = images.mean(dim=1, keepdim=True)
    dx = F.pad(grey.diff(dim=3), (0, 1))
    dy = F.pad(grey.diff(dim=2), (0, 0, 0, 1))
    angles = torch.arange(8, dtype=images.dtype, device=images.device) * (torch.pi / 4)
    directions = F.relu(dx * angles.cos()[:, None, None] + dy * angles.sin()[:, None, None])
    strength = (dx.square() + dy.square() + 1e-12).sqrt()
    mean = F.avg_pool2d(images, cell_px)
    spread = (F.avg_pool2d(images.square(), cell_px) - mean.square()).clamp_min(0).sqrt()
    return torch.cat((mean, spread, 4 * F.avg_pool2d(torch.cat((directions, strength), dim=1), cell_px)), dim=1)
