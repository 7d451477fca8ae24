"""Group relative policy optimisation of a flow: log-probabilities, ratios, clipped losses, KL (alignment of R1 and R4).

A policy draws the next state from N(mean, std^2 I); tensors are (B, N, C) in fp32, one row a transition. Log-probabilities are
means over a state's D = N C values, not sums, as in Flow-GRPO's code: a ratio is then the D-th root of the true one, and clip
ranges belong to D.

What guidance an objective sees is part of its type. A `Replay` can be made from a model's velocities alone, under one
`GuidanceMode`; old and new ones of different modes have no ratio, and what a rollout drew around is no `Replay`. So an objective on
conditional velocities, whose rollout was guided (the hybrid of R1), has to look at the old policy again: with the guided
means as old ones, every ratio would be off by the guidance itself before the first update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model_core.recipe import SDE, GuidanceMode


@dataclass(frozen=True)
class Replay:
    """Means (B, N, C) and standard deviations (B, 1, 1) of transitions under a policy, by velocities of `mode`."""

    mean: Tensor
    std: Tensor
    mode: GuidanceMode

    def detach(self) -> Replay:
        """The same as constants: what is kept as the old policy's."""
        return Replay(self.mean.detach(), self.std.detach(), self.mode)


@dataclass(frozen=True)
class Surrogate:
    """What a batch of B transitions contributes: `loss` (B,), and whether its ratio was held at the upper or the lower bound."""

    loss: Tensor
    ratio: Tensor
    at_upper: Tensor
    at_lower: Tensor


def log_prob(action: Tensor, policy: Replay, *, sde: SDE) -> Tensor:
    """(B,) log N(action; mean, std^2), averaged over a state's values; for CPS -mean (action - mean)^2, without 1 / (2 std^2).

    CPS drops the factor as in Flow-CPS's code, whose steps may have no noise; its ratios are tempered, and its clip ranges its own.
    """
    error = (action.detach() - policy.mean).square()
    if sde == "cps":
        return -error.flatten(1).mean(1)
    normaliser = policy.std.log() + 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=error.dtype, device=error.device))
    return (-error / (2 * policy.std.square()) - normaliser).flatten(1).mean(1)


def log_ratio(action: Tensor, new: Replay, old: Replay, *, sde: SDE) -> Tensor:
    """(B,) log-probability under the new policy less that under the old one; raises TypeError for different guidance modes.

    Under the old policy its mean is -delta^2 / 2 and its deviation delta / sqrt(D), delta the RMS of the means' drift over std.
    """
    _comparable(new, old)
    return log_prob(action, new, sde=sde) - log_prob(action, old.detach(), sde=sde)


def guarded_log_ratio(action: Tensor, new: Replay, old: Replay) -> Tensor:
    """(B,) mean of z (mean_new - mean_old), z the rollout's noise in units of std (GRPO-Guard, arXiv 2510.22319, RatioNorm).

    It is (log ratio + |drift|^2 / (2 std^2)) std: without the drift's bias, which lets no upper bound bind, and of the same spread at
    every noise level. Raises TypeError for different guidance modes.
    """
    _comparable(new, old)
    noise = (action.detach() - old.mean.detach()) / old.std
    return (noise * (new.mean - old.mean.detach())).flatten(1).mean(1)


def gaussian_kl(new: Replay, old: Replay) -> Tensor:
    """(B,) KL divergence of transitions of equal std, averaged over a state's values: mean |drift|^2 / (2 std^2).

    std holds sqrt(-dt), so this is the true KL; with the diffusion coefficient in its place, as in Flow-GRPO's code, it would be
    that times |dt|.
    """
    _comparable(new, old)
    return ((new.mean - old.mean.detach()).square() / (2 * new.std.square())).flatten(1).mean(1)


def ppo_loss(log_ratios: Tensor, advantages: Tensor, *, clip: float) -> Surrogate:
    """max(-A r, -A clip(r, 1 - clip, 1 + clip)) for B transitions (PPO, arXiv 1707.06347, eq. 7)."""
    ratio = log_ratios.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return Surrogate(loss, ratio.detach(), (advantages > 0) & (ratio > 1 + clip), (advantages < 0) & (ratio < 1 - clip))


def dppo_loss(log_ratios: Tensor, advantages: Tensor, divergences: Tensor, *, max_kl: float) -> Surrogate:
    """-A r where the policy stays near the old one; zero for a transition whose KL has reached `max_kl` and would grow (Flow-DPPO).

    It would grow where A > 0 and r > 1, or A < 0 and r < 1: the update goes on in the direction in which the means have drifted.
    """
    ratio = log_ratios.exp()
    far = divergences.detach() >= max_kl
    at_upper, at_lower = far & (advantages > 0) & (ratio > 1), far & (advantages < 0) & (ratio < 1)
    loss = torch.where(at_upper | at_lower, torch.zeros_like(ratio), -advantages * ratio)
    return Surrogate(loss, ratio.detach(), at_upper, at_lower)


def _comparable(new: Replay, old: Replay) -> None:
    if new.mode != old.mode:
        raise TypeError(f"found means under guidance modes {new.mode} and {old.mode}; a ratio needs both under the same")
