"""One iteration of distillation: the fake score learns what the student draws, and the student moves to where the teachers' score leads.

Both phases begin with the student's own rollout (backward simulation): it is trained on the states that it meets when it is sampled, at
one step of its grid, the same on all ranks. Every draw is keyed by (seed, phase, iteration, place in the batch): neither ranks, chunks
nor a restart change what is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model_core.data.keys import keyed_generator
from model_core.data.prompts import PolicyPrompt
from model_core.models.condition import ConditionEncoder
from model_core.models.mmdit import MMDiT
from model_core.models.segments import Grid
from model_core.models.vae import ResidualVAE
from model_core.objectives.distillation import distillation_loss, matching_gradient, split_real
from model_core.objectives.flow import flow_loss, interpolate, shift_mu, shift_time, velocity_target
from model_core.objectives.guidance import guide
from model_core.recipe import DMD, CompressionRatio, Sampling, Teacher
from model_core.sampling.conditions import Conditions, join, sampling_velocity, velocity
from model_core.sampling.few_step import FewStep, clean_prediction, renoise
from model_core.training.distributed import Ranks, sum_gradients, sum_over_ranks
from model_core.training.rollouts import chunks_of, policy_conditions

NUM_BINS = 4  # of times, in which the fake score's error is told
CRITIC, STUDENT = "critic", "student"


@dataclass(frozen=True)
class Distiller:
    """What does not change while a student is distilled; the teachers are frozen."""

    vae: ResidualVAE
    encoder: ConditionEncoder
    teachers: Mapping[str, MMDiT]
    sampling: Sampling
    config: DMD
    seed: int
    ranks: Ranks

    @property
    def sampler(self) -> FewStep:
        """How the student is sampled."""
        return FewStep(self.config.student_steps, self.sampling.shift_mu)

    @property
    def guided(self) -> bool:
        """Whether the teachers are."""
        return self.sampling.guidance_scale != 1.0

    def exit_step(self, iteration: int, phase: str) -> int:
        """The student's step at which its prediction is taken."""
        return int(keyed_generator(self.seed, "distillation exit", phase, iteration).integers(self.config.student_steps))

    def chunks(self, prompts: Sequence[PolicyPrompt], *, guided: bool) -> list[DistillationChunk]:
        """This rank's samples, one a prompt, encoded; with the unconditional branch where `guided`."""
        places = self.ranks.share(len(prompts))
        found = []
        for members in chunks_of(prompts, list(places), groups_a_chunk=self.config.samples_a_chunk):
            chosen = [prompts[place] for place in members]
            conditions, unconditional = policy_conditions(self.vae, self.encoder, chosen, repeats=1, guided=guided)
            height, width = chosen[0].size_px
            found.append(DistillationChunk(members, conditions, unconditional, (height // CompressionRatio, width // CompressionRatio)))
        return found


@dataclass(frozen=True)
class DistillationChunk:
    """B samples that go through the models together; `places` are theirs in the batch, `shape` is in latents."""

    places: Sequence[int]
    conditions: Conditions
    unconditional: Conditions | None
    shape: Grid

    @property
    def num_tokens(self) -> int:
        """Latent tokens of a picture."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class CriticMeasures:
    """Of a batch: mean squared error of the fake score's velocity, and by quarter of the times from 0 to 1 (NaN where none was drawn)."""

    loss: float
    by_time: list[float]


@dataclass(frozen=True)
class StudentMeasures:
    """Of a batch: RMS of the matching gradient, samples without a normaliser, and the rank's first chunk's clean latents (B, N, C)."""

    gradient_rms: float
    num_empty: int
    clean: Tensor
    shape: Grid


class Draws:
    """The draws of a chunk's samples in a phase, one after the other, each sample by its own generator."""

    def __init__(self, distiller: Distiller, chunk: DistillationChunk, phase: str, iteration: int, *, channels: int) -> None:
        key = (distiller.seed, "distillation", phase, iteration)
        self._generators = [keyed_generator(*key, place) for place in chunk.places]
        self._shape = (chunk.num_tokens, channels)
        self._device = chunk.conditions.images.device
        self._mu = shift_mu(chunk.num_tokens, distiller.sampling.shift_mu)

    def noise(self) -> Tensor:
        """(B, N, C) standard normal."""
        drawn = [generator.standard_normal(self._shape, dtype=np.float32) for generator in self._generators]
        return torch.from_numpy(np.stack(drawn)).to(self._device)

    def times(self, bounds: tuple[float, float]) -> Tensor:
        """(B,) uniform, moved towards noise as the sampler's times are, and held within `bounds`."""
        drawn = [shift_time(1.0 - generator.random(), mu=self._mu) for generator in self._generators]
        return torch.tensor(drawn, dtype=torch.float32, device=self._device).clamp(*bounds)


def critic_backward(
    distiller: Distiller, student: MMDiT, critic: MMDiT, chunks: Sequence[DistillationChunk], *, iteration: int, num_elements: int
) -> CriticMeasures:
    """Adds up the gradients of flow matching on the student's pictures, a mean over all ranks' `num_elements` values."""
    device = next(critic.parameters()).device
    sums = torch.zeros(1 + 2 * NUM_BINS, dtype=torch.float64, device=device)
    for chunk in chunks:
        draws = Draws(distiller, chunk, CRITIC, iteration, channels=critic.latent_channels)
        x, t_exit = simulate(distiller, student, chunk, draws, exit_step=distiller.exit_step(iteration, CRITIC))
        with torch.no_grad():
            clean = clean_prediction(x, sampling_velocity(student, chunk.conditions)(x, x.new_full((len(x),), t_exit)), t_exit).float()
        t, noise = draws.times(distiller.config.match_times), draws.noise()
        noised, target = interpolate(clean, noise, t[:, None]), velocity_target(clean, noise)
        found = velocity(critic, chunk.conditions)(noised, t)
        loss = flow_loss(found, target, num_elements=num_elements)
        loss.backward()
        errors = (found.detach() - target).square().mean(dim=(1, 2)).double()
        bins = (t * NUM_BINS).long().clamp_max(NUM_BINS - 1)
        sums[0] += loss.detach().double()
        sums[1 : 1 + NUM_BINS].index_add_(0, bins, errors)
        sums[1 + NUM_BINS :].index_add_(0, bins, torch.ones_like(errors))
    sum_gradients(critic.parameters(), distiller.ranks)
    loss_sum, *rest = sum_over_ranks(sums, distiller.ranks).tolist()
    by_time = [error / num if num else float("nan") for error, num in zip(rest[:NUM_BINS], rest[NUM_BINS:], strict=True)]
    return CriticMeasures(loss_sum, by_time)


def student_backward(
    distiller: Distiller, student: MMDiT, critic: MMDiT, chunks: Sequence[DistillationChunk], *, iteration: int, num_elements: int
) -> StudentMeasures:
    """Adds up the gradients of distribution matching for the student's prediction at the exit step, a mean over all ranks' values."""
    device = next(student.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    exit_step = distiller.exit_step(iteration, STUDENT)
    first: tuple[Tensor, Grid] | None = None
    for chunk in chunks:
        draws = Draws(distiller, chunk, STUDENT, iteration, channels=student.latent_channels)
        x, t_exit = simulate(distiller, student, chunk, draws, exit_step=exit_step)
        clean = clean_prediction(x, velocity(student, chunk.conditions)(x, x.new_full((len(x),), t_exit)), t_exit)
        with torch.no_grad():
            fake, real = _predictions(distiller, critic, chunk, clean.detach(), draws, weights=distiller.config.teacher_weights[exit_step])
            gradient, num_empty = matching_gradient(clean.detach(), fake, real)
        distillation_loss(clean, gradient, num_elements=num_elements).backward()
        sums += torch.stack([gradient.square().sum() / num_elements, num_empty.double()])
        first = first or (clean.detach().float(), chunk.shape)
    sum_gradients(student.parameters(), distiller.ranks)
    squared, empty = sum_over_ranks(sums, distiller.ranks).tolist()
    if first is None:
        first = (torch.zeros(0, 0, student.latent_channels, device=device), (0, 0))
    return StudentMeasures(squared**0.5, int(empty), *first)


@torch.no_grad()
def simulate(distiller: Distiller, student: MMDiT, chunk: DistillationChunk, draws: Draws, *, exit_step: int) -> tuple[Tensor, float]:
    """The state (B, N, C) that the student meets at `exit_step` of its own rollout, and the time there; no gradient leads before it."""
    times = distiller.sampler.times(chunk.num_tokens)
    x = draws.noise()
    ask = sampling_velocity(student, chunk.conditions) if exit_step else None
    for step in range(exit_step):
        assert ask is not None
        clean = clean_prediction(x, ask(x, x.new_full((len(x),), times[step])), times[step])
        x = renoise(clean, draws.noise(), times[step + 1])
    return x, times[exit_step]


def _predictions(
    distiller: Distiller, critic: MMDiT, chunk: DistillationChunk, clean: Tensor, draws: Draws, *, weights: Mapping[Teacher, float]
) -> tuple[Tensor, Tensor]:
    """The fake and the real clean prediction, fp64, of the student's pictures noised to drawn times."""
    config = distiller.config
    t, noise = draws.times(config.match_times), draws.noise()
    x = renoise(clean, noise, t[:, None, None])
    fake = clean_prediction(x, sampling_velocity(critic, chunk.conditions)(x, t), t[:, None, None])
    if not distiller.guided:
        return fake, _real(distiller, chunk, x, t, weights)[0]
    if config.guidance_times is None:
        return fake, _real(distiller, chunk, x, t, weights)[1]
    apart, other = draws.times(config.guidance_times), draws.noise()
    conditional, guided = _real(distiller, chunk, renoise(clean, other, apart[:, None, None]), apart, weights)
    matched = _real(distiller, chunk, x, t, weights, guided=False)[0]
    return fake, split_real(matched, guided, conditional)


def _real(
    distiller: Distiller, chunk: DistillationChunk, x: Tensor, t: Tensor, weights: Mapping[Teacher, float], *, guided: bool = True
) -> tuple[Tensor, Tensor]:
    """Clean predictions by the teachers' weighted velocities: the conditional one, and the guided one (the same without guidance)."""
    unconditional = chunk.unconditional if guided else None
    conditional_sum, guided_sum = torch.zeros_like(x), torch.zeros_like(x)
    for name, weight in weights.items():
        if not weight:
            continue
        teacher = distiller.teachers[name]
        if unconditional is None:
            conditional = taken = sampling_velocity(teacher, chunk.conditions)(x, t)
        else:
            both = sampling_velocity(teacher, join([chunk.conditions, unconditional]))(torch.cat((x, x)), torch.cat((t, t)))
            conditional, without = both.chunk(2)
            sampling = distiller.sampling
            taken = guide(conditional, without, scale=sampling.guidance_scale, rescale_norm=sampling.rescale_norm)
        conditional_sum, guided_sum = conditional_sum + weight * conditional, guided_sum + weight * taken
    at = t[:, None, None]
    return clean_prediction(x, conditional_sum, at), clean_prediction(x, guided_sum, at)


def num_values(prompts: Sequence[PolicyPrompt], channels: int) -> int:
    """Latent values of one picture of each prompt: what a mean over all ranks is taken of."""
    return sum(height * width // CompressionRatio**2 for height, width in (prompt.size_px for prompt in prompts)) * channels
