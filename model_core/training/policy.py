"""One update of a flow policy on what was rolled out: replays, losses and gradients, micro-batch by micro-batch.

The old policy's means are taken in the first pass over a rollout, where the policy still is the old one: so the ratio is exactly 1
there in every guidance mode, at no cost, and later passes have means of the same mode to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model_core.models.mmdit import MMDiT
from model_core.objectives.grpo import Replay, Surrogate, dppo_loss, gaussian_kl, guarded_log_ratio, log_ratio, ppo_loss
from model_core.objectives.guidance import objective_velocity
from model_core.recipe import GRPO, GuidanceMode, Sampling
from model_core.sampling.conditions import velocity
from model_core.sampling.sde import transition
from model_core.training.distributed import Ranks, sum_gradients, sum_over_ranks
from model_core.training.rollouts import Chunk

MEASURED = ("loss", "ratio", "at_upper", "at_lower", "drift_squared", "kl")


@dataclass
class OldPolicy:
    """Means of all transitions of a rollout under the policy that it began with, by chunk and micro-batch."""

    replays: dict[tuple[int, int], Replay] = field(default_factory=dict)

    def of(self, place: tuple[int, int], new: Replay) -> Replay:
        """The old policy's replay: in the first pass the new one itself."""
        return self.replays.setdefault(place, new.detach())


@dataclass(frozen=True)
class Learner:
    """A policy under training; `reference` switches the model over to the one that the KL is taken to, where it has a weight.

    For adapters it is the model without them; else a frozen copy.
    """

    model: MMDiT
    config: GRPO
    sampling: Sampling
    reference: Callable[[], AbstractContextManager[MMDiT]]

    def backward(
        self, chunks: Sequence[Chunk], advantages: Tensor, kept: Tensor, old: OldPolicy, *, num_kept: int, ranks: Ranks
    ) -> dict[str, float]:
        """Adds up the gradients of the mean loss over all ranks' transitions of `kept` samples, of which there are `num_kept`.

        `advantages` and `kept` are (P, G) for the update's groups. Returns means of what is measured, the same on all ranks.
        """
        device = next(self.model.parameters()).device
        sums = torch.zeros(len(MEASURED), dtype=torch.float64, device=device)
        num_transitions = num_kept * self.config.window_steps
        for number, chunk in enumerate(chunks):
            places = torch.tensor(chunk.places)
            per_sample = advantages[places].flatten()
            for part, rows in enumerate(self._micro_batches(kept[places].flatten())):
                weights = per_sample[rows // self.config.window_steps]
                sums += self._backward(chunk, rows, weights, old, (number, part), num_transitions)
        sum_gradients(self.model.parameters(), ranks)
        means = sum_over_ranks(sums, ranks) / max(num_transitions, 1)
        return dict(zip(MEASURED, means.tolist(), strict=True))

    def replay(self, model: MMDiT, chunk: Chunk, samples: Tensor, slots: Tensor) -> Replay:
        """What the model's transitions are at states of a rollout: those of `samples` (R,) at window steps `slots` (R,)."""
        config, trajectories = self.config, chunk.trajectories
        mode = GuidanceMode.NONE if chunk.unconditional is None else config.guidance_mode
        x, t, following = (value[samples, slots] for value in (trajectories.states, trajectories.t, trajectories.following))
        rows = samples.tolist()
        conditional = velocity(model, chunk.conditions.rows(rows))(x, t)
        unconditional = None
        if chunk.unconditional is not None and mode in (GuidanceMode.FULL, GuidanceMode.DETACH):
            with torch.set_grad_enabled(torch.is_grad_enabled() and mode == GuidanceMode.FULL):
                unconditional = velocity(model, chunk.unconditional.rows(rows))(x, t)
        scale, rescale_norm = self.sampling.guidance_scale, self.sampling.rescale_norm
        objective = objective_velocity(mode, conditional, unconditional, scale=scale, rescale_norm=rescale_norm)
        drawn = transition(config.sde, x, objective, t=t, following=following, noise_level=config.noise_level)
        return Replay(drawn.mean, drawn.std, mode)

    def _micro_batches(self, kept: Tensor) -> Iterator[Tensor]:
        """Numbers of the transitions of kept samples, sample by sample, as many as go through the model at a time."""
        window = self.config.window_steps
        samples = kept.nonzero().squeeze(1)
        numbers = (samples[:, None] * window + torch.arange(window)).flatten()
        yield from (part for part in numbers.split(self.config.micro_batch) if len(part))

    def _backward(
        self, chunk: Chunk, numbers: Tensor, advantages: Tensor, old: OldPolicy, place: tuple[int, int], num_transitions: int
    ) -> Tensor:
        config, device = self.config, chunk.trajectories.states.device
        samples, slots = (numbers // config.window_steps).to(device), (numbers % config.window_steps).to(device)
        action = chunk.trajectories.actions[samples, slots]
        new = self.replay(self.model, chunk, samples, slots)
        before = old.of(place, new)
        surrogate = self._surrogate(action, new, before, advantages.to(device))
        loss = surrogate.loss
        if config.ratio == "guard":  # GRPO-Guard: steps of the grid weigh alike, whatever their length
            loss = loss / (chunk.trajectories.t - chunk.trajectories.following)[samples, slots]
        kl = torch.zeros_like(loss)
        if config.kl_weight:
            with torch.no_grad(), self.reference() as reference:
                anchor = self.replay(reference, chunk, samples, slots)
            kl = gaussian_kl(new, anchor)
        ((loss + config.kl_weight * kl).sum() / num_transitions).backward()
        drift = ((new.mean - before.mean) / new.std).detach().square().flatten(1).mean(1)
        measured = (loss, surrogate.ratio, surrogate.at_upper, surrogate.at_lower, drift, kl)
        return torch.stack([value.detach().double().sum() for value in measured])

    def _surrogate(self, action: Tensor, new: Replay, old: Replay, advantages: Tensor) -> Surrogate:
        config = self.config
        if config.ratio == "guard":
            return ppo_loss(guarded_log_ratio(action, new, old), advantages, clip=config.clip)
        ratios = log_ratio(action, new, old, sde=config.sde)
        if config.ratio == "ppo":
            return ppo_loss(ratios, advantages, clip=config.clip)
        return dppo_loss(ratios, advantages, gaussian_kl(new, old), max_kl=config.clip)
