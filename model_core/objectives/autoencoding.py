"""Losses of the autoencoder: reconstruction and semantic alignment, without GAN and KL (R1 3.1, R2 4.2).

Legend: B batch, h and w sides of the latent, P = h w its places, C channels of the teacher's features.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def l1_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error (R2: weight 1). Alone, it is content with the median of flat pictures: their background."""
    return (prediction - target).abs().mean()


def mse_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error: what PSNR measures."""
    return (prediction - target).square().mean()


def edge_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels, across plus down (ours; in place of LPIPS)."""
    error = prediction - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def alignment_loss(projected: Tensor, features: Tensor, *, margins: tuple[float, float]) -> Tensor:
    """VA-VAE's loss as R2 4.2 gives it: mcos + mdms of projected latents and a frozen teacher's features, both (B, C, h, w).

    mcos = mean over places p of ReLU(1 - cos(z_p, f_p) - m_cos); mdms = mean over pairs (p, q) of one picture of
    ReLU(|cos(z_p, z_q) - cos(f_p, f_q)| - m_dist). `margins` is (m_cos, m_dist). Raises ValueError for unequal shapes.
    """
    if projected.shape != features.shape:
        raise ValueError(
            f"projected latents have shape {tuple(projected.shape)}, the teacher's features {tuple(features.shape)}; they must be equal"
        )
    margin_cos, margin_dist = margins
    latents = F.normalize(projected.flatten(2), dim=1)
    teacher = F.normalize(features.flatten(2), dim=1)
    cosine = (latents * teacher).sum(1)
    structure = latents.transpose(1, 2) @ latents - teacher.transpose(1, 2) @ teacher
    return F.relu(1 - cosine - margin_cos).mean() + F.relu(structure.abs() - margin_dist).mean()


def margins_at(step: int, *, steps: int, strict: tuple[float, float], relaxed: tuple[float, float]) -> tuple[float, float]:
    """(m_cos, m_dist) of step `step` of `steps`: from strict to relaxed, linearly (R1 3.1 gives the direction, not the shape)."""
    share = step / max(steps - 1, 1)
    return (strict[0] + share * (relaxed[0] - strict[0]), strict[1] + share * (relaxed[1] - strict[1]))
