"""Losses of the autoencoder: reconstruction and semantic alignment, without GAN and KL (R1 3.1, R2 4.2).

Legend: B batch, h and w sides of the latent, P = h w its places, C channels of the teacher's features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model_core.data.keys import keyed_permutation

MAX_PAIR_PLACES = 32 * 32


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


def alignment_loss(projected: Tensor, features: Tensor, *, margins: tuple[float, float], places: Tensor | None = None) -> Tensor:
    """VA-VAE's loss as R2 4.2 gives it: mcos + mdms of projected latents and a frozen teacher's features, both (B, C, h, w).

    mcos = mean over places p of ReLU(1 - cos(z_p, f_p) - m_cos); mdms = mean over pairs (p, q) of one picture of
    ReLU(|cos(z_p, z_q) - cos(f_p, f_q)| - m_dist). `margins` is (m_cos, m_dist). `places` (K,) int64, all different, are
    those whose pairs are looked at: drawn evenly, they leave mdms's expectation as it is. None: all, which costs P^2.
    Raises ValueError for unequal shapes.
    """
    if projected.shape != features.shape:
        raise ValueError(
            f"projected latents have shape {tuple(projected.shape)}, the teacher's features {tuple(features.shape)}; they must be equal"
        )
    margin_cos, margin_dist = margins
    latents = F.normalize(projected.flatten(2), dim=1)
    teacher = F.normalize(features.flatten(2), dim=1)
    cosine = (latents * teacher).sum(1)
    num_places, share = latents.shape[2], 1.0
    if places is not None:
        latents, teacher = latents[:, :, places], teacher[:, :, places]
        # A place differs by nothing from itself; among fewer places, such pairs are a larger share of all.
        share = (1 - 1 / num_places) / (1 - 1 / len(places))
    structure = latents.transpose(1, 2) @ latents - teacher.transpose(1, 2) @ teacher
    return F.relu(1 - cosine - margin_cos).mean() + share * F.relu(structure.abs() - margin_dist).mean()


def pair_places(num_places: int, *key: object) -> Tensor | None:
    """Which places' pairs `alignment_loss` looks at: 32 x 32 drawn by the key, or None, all of them, up to that many."""
    return torch.from_numpy(keyed_permutation(num_places, *key)[:MAX_PAIR_PLACES]) if num_places > MAX_PAIR_PLACES else None


def value_at(step: int, *, steps: int, strict: float, relaxed: float) -> float:
    """A number of step `step` of `steps`: from strict to relaxed, linearly (R1 3.1 gives the direction, not the shape)."""
    return strict + step / max(steps - 1, 1) * (relaxed - strict)


def margins_at(step: int, *, steps: int, strict: tuple[float, float], relaxed: tuple[float, float]) -> tuple[float, float]:
    """(m_cos, m_dist) of step `step` of `steps`: from strict to relaxed, linearly."""
    return (
        value_at(step, steps=steps, strict=strict[0], relaxed=relaxed[0]),
        value_at(step, steps=steps, strict=strict[1], relaxed=relaxed[1]),
    )
