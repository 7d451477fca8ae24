"""On-policy distillation: one student takes up several policies, each on the prompts that it was trained for (R4).

The student rolls out its own states by the ODE, and its velocity at each of them is drawn to that of the prompt's teacher. Conditional
velocities are matched on conditional passes, and unconditional ones on passes without a prompt: guidance stays as it was, for the
few-step distillation to fold in (docs/decisions/0015-merged-policies.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from model_core.data.prompts import PolicyPrompt
from model_core.models.mmdit import MMDiT
from model_core.objectives.flow import flow_loss
from model_core.recipe import CompressionRatio
from model_core.sampling.conditions import Conditions, velocity
from model_core.sampling.ode import euler_states
from model_core.training.distributed import Ranks, sum_gradients, sum_over_ranks
from model_core.training.rollouts import Artist, chunks_of, policy_conditions, rollout_times, sampler_velocity


def kind_of(prompt: PolicyPrompt) -> str:
    """Which policy a prompt belongs to: `edit` where it has sources, else `image`."""
    return "edit" if prompt.encoded else "image"


def merging_backward(
    student: MMDiT,
    teachers: Mapping[str, MMDiT],
    artist: Artist,
    prompts: Sequence[PolicyPrompt],
    places: Sequence[int],
    *,
    update: int,
    ranks: Ranks,
) -> Tensor:
    """Adds up the gradients of mean |v_student - v_teacher|^2 over all ranks' states; returns that mean.

    `places` are this rank's among the update's prompts, a sample each; `teachers` are by `kind_of`.
    """
    config = artist.config
    num_elements = sum(_num_states(artist, prompt) for prompt in prompts) * student.latent_channels
    total = torch.zeros((), dtype=torch.float64, device=next(student.parameters()).device)
    for members in chunks_of(prompts, places, groups_a_chunk=config.groups_a_chunk):
        chosen = [prompts[place] for place in members]
        conditions, unconditional = policy_conditions(artist.vae, artist.encoder, chosen, repeats=1, guided=artist.guided)
        (height, width), teacher = chosen[0].size_px, teachers[kind_of(chosen[0])]
        shape = (height // CompressionRatio, width // CompressionRatio)
        noise = np.stack([artist.noise(student.latent_channels, shape, update, prompt.prompt_id, "merging") for prompt in chosen])
        times = rollout_times(artist, chosen[0].size_px, num_steps=config.rollout_steps)
        follow = sampler_velocity(artist, student, conditions, unconditional)
        states = euler_states(follow, torch.from_numpy(noise).to(conditions.images.device), times)
        for branch in (conditions, unconditional):
            if branch is not None:
                share = num_elements * (2 if artist.guided else 1)
                total += _match(student, teacher, branch, states, times, micro_batch=config.micro_batch, num_elements=share)
    sum_gradients(student.parameters(), ranks)
    loss: Tensor = sum_over_ranks(total, ranks)
    return loss


def _num_states(artist: Artist, prompt: PolicyPrompt) -> int:
    """Tokens of all states of a prompt's rollout."""
    return artist.config.rollout_steps * prompt.size_px[0] * prompt.size_px[1] // CompressionRatio**2


def _match(
    student: MMDiT, teacher: MMDiT, conditions: Conditions, states: Tensor, times: Tensor, *, micro_batch: int, num_elements: int
) -> Tensor:
    """Adds gradients for states (B, S, N, C) at the first S of `times`; returns this part of the mean, detached."""
    num_steps = states.shape[1]
    loss = states.new_zeros((), dtype=torch.float64)
    for numbers in torch.arange(len(states) * num_steps).split(micro_batch):
        rows, steps = numbers // num_steps, numbers % num_steps
        chosen = conditions.rows(rows.tolist())
        x, t = states[rows.to(states.device), steps.to(states.device)], times[steps].to(states.device, states.dtype)
        with torch.no_grad():
            target = velocity(teacher, chosen)(x, t)
        part = flow_loss(velocity(student, chosen)(x, t), target, num_elements=num_elements)
        part.backward()
        loss += part.detach()
    return loss
