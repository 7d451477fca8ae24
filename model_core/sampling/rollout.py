"""Rollouts of a flow policy: the ODE's steps, but for a window of stochastic ones, whose states and actions are kept (Flow-GRPO-Fast).

Trajectories are fp32: actions stored in bfloat16 would no longer be what was drawn, and every ratio off from the start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model_core.recipe import SDE
from model_core.sampling.sde import transition


@dataclass(frozen=True)
class Trajectories:
    """Of B rollouts the K trained steps: `states` before and `actions` after each (B, K, N, C), at times `t` to `following` (B, K).

    There are no log-probabilities: an objective takes its own from the states, under its own guidance. `latents` (B, N, C) are the
    rollouts' ends.
    """

    states: Tensor
    actions: Tensor
    t: Tensor
    following: Tensor
    latents: Tensor


@torch.no_grad()
def roll_out(
    velocity: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    times: Tensor,
    *,
    first_steps: Tensor,
    num_steps: int,
    sde: SDE,
    noise_level: float,
    step_noise: Callable[[int], Tensor],
) -> Trajectories:
    """Carries noise (B, N, C) along `times` (S + 1,), from 1 to 0.

    Sample b's steps `first_steps[b]` to `first_steps[b] + num_steps - 1` are stochastic, drawn with `step_noise(step)` (B, N, C);
    raises ValueError where a window reaches the last step, whose noise would stay in the picture or be none.
    """
    last = len(times) - 2
    if int(first_steps.max()) + num_steps - 1 >= last:
        raise ValueError(f"found windows up to step {int(first_steps.max()) + num_steps - 1}; allowed are steps before the last, {last}")
    x = noise.float()
    states, actions = (x.new_empty(len(x), num_steps, *x.shape[1:]) for _ in range(2))
    for step, (t, following) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        v = velocity(x, t)
        slot = step - first_steps
        rows = ((slot >= 0) & (slot < num_steps)).nonzero().squeeze(1)
        carried = x + (following - t) * v
        if len(rows):
            span = {"t": x.new_full((len(rows),), t), "following": x.new_full((len(rows),), following)}
            drawn = transition(sde, x[rows], v[rows], **span, noise_level=noise_level)
            carried[rows] = drawn.mean + drawn.std * step_noise(step)[rows]
            states[rows, slot[rows]], actions[rows, slot[rows]] = x[rows], carried[rows]
        x = carried
    steps = first_steps[:, None] + torch.arange(num_steps, device=first_steps.device)
    grid = times.to(x.device, x.dtype)
    return Trajectories(states, actions, grid[steps], grid[steps + 1], x)
