"""Classifier-free guidance on velocities, with the norm kept (Qwen-Image pipeline: "true CFG" with norm rescaling)."""

from __future__ import annotations

from torch import Tensor

from model_core.recipe import GuidanceMode


def guide(conditional: Tensor, unconditional: Tensor, *, scale: float, rescale_norm: bool) -> Tensor:
    """v = u + scale (c - u) for velocities (B, N, C); `rescale_norm` gives each token the norm of its conditional velocity."""
    guided = unconditional + scale * (conditional - unconditional)
    if not rescale_norm:
        return guided
    norm = guided.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return guided * (conditional.norm(dim=-1, keepdim=True) / norm)


def objective_velocity(
    mode: GuidanceMode, conditional: Tensor, unconditional: Tensor | None, *, scale: float, rescale_norm: bool
) -> Tensor:
    """The velocity that an objective of `mode` is about; raises ValueError where the mode needs the unconditional one and has none."""
    if mode in (GuidanceMode.CONDITIONAL, GuidanceMode.NONE):
        return conditional
    if unconditional is None:
        raise ValueError(f"guidance mode {mode} needs the unconditional velocity")
    constant = mode == GuidanceMode.DETACH
    return guide(conditional, unconditional.detach() if constant else unconditional, scale=scale, rescale_norm=rescale_norm)
