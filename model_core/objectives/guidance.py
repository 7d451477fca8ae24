"""Classifier-free guidance on velocities, with the norm kept (Qwen-Image pipeline: "true CFG" with norm rescaling)."""

from __future__ import annotations

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, *, scale: float, rescale_norm: bool) -> Tensor:
    """v = u + scale (c - u) for velocities (B, N, C); `rescale_norm` gives each token the norm of its conditional velocity."""
    guided = unconditional + scale * (conditional - unconditional)
    if not rescale_norm:
        return guided
    norm = guided.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return guided * (conditional.norm(dim=-1, keepdim=True) / norm)
