"""Batches for train_mmdit: the plan's samples, with their prompts, noise and timesteps.

Every draw is keyed by (seed, stage, sample id, epoch), so a sample meets the same noise on any number of ranks and after
any number of restarts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model_core.data.keys import keyed_generator
from model_core.data.latents import LatentShard
from model_core.data.plan import Draw, Plan
from model_core.objectives.flow import logit_normal


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one shape: `latents`, `noise` (B, N, C); `references` R of (B, N, C); `t` (B,); B prompts; N = h w tokens."""

    latents: Tensor
    noise: Tensor
    references: list[Tensor]
    t: Tensor
    prompts: list[str]
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Draws:
    """How a sample is drawn: p(t), the share that loses its prompt, and how often each caption type is taken."""

    logit_normal: tuple[float, float]
    uncond_dropout: float
    caption_weights: dict[str, float]


class LatentRows:
    """The rows that may be trained on, by kind, over all shards of a stage."""

    def __init__(self, shards: Sequence[LatentShard], kinds: Sequence[str], *, held_out: bool = False) -> None:
        self.shards = list(shards)
        self._rows: dict[str, list[tuple[int, int]]] = {kind: [] for kind in kinds}
        for index, shard in enumerate(self.shards):
            for row, (kind, out) in enumerate(zip(shard.kinds, shard.held_out, strict=True)):
                if kind in self._rows and out == held_out:
                    self._rows[kind].append((index, row))

    @property
    def sizes(self) -> dict[str, int]:
        """Rows a kind."""
        return {kind: len(rows) for kind, rows in self._rows.items()}

    def locate(self, draw: Draw) -> tuple[int, int]:
        """(shard, row in it) of a plan's draw."""
        return self._rows[draw.kind][draw.row]


class Loader:
    """Makes the micro-batches of any global batch number."""

    def __init__(self, rows: LatentRows, plan: Plan, draws: Draws) -> None:
        self._rows, self._plan, self._draws = rows, plan, draws

    def batch(self, number: int) -> list[MicroBatch]:
        """Global batch `number`, split by shape; together `plan.batch_size` samples."""
        groups: dict[int, list[tuple[int, Draw]]] = defaultdict(list)
        for draw in self._plan.batch(number):
            shard, row = self._rows.locate(draw)
            groups[shard].append((row, draw))
        return [self._micro_batch(self._rows.shards[shard], groups[shard]) for shard in sorted(groups)]

    def _micro_batch(self, shard: LatentShard, samples: list[tuple[int, Draw]]) -> MicroBatch:
        index = [row for row, _ in samples]
        noise, times, prompts = [], [], []
        for row, draw in samples:
            generator = keyed_generator(self._plan.seed, self._plan.stage, shard.sample_ids[row], draw.epoch)
            times.append(logit_normal(generator.standard_normal(), *self._draws.logit_normal))
            prompts.append(draw_prompt(shard, row, self._draws, generator))
            noise.append(generator.standard_normal(shard.latents.shape[1:], dtype=np.float32))
        return MicroBatch(
            latents=tokens(shard.latents[index]),
            noise=tokens(np.stack(noise)),
            references=[tokens(shard.references[index, slot]) for slot in range(shard.references.shape[1])],
            t=torch.tensor(times, dtype=torch.float32),
            prompts=prompts,
            shape=shard.shape,
        )


def draw_prompt(shard: LatentShard, row: int, draws: Draws, generator: np.random.Generator) -> str:
    """The prompt of one sample: nothing with probability `uncond_dropout`; else an edit's instruction, or a caption of a drawn type."""
    dropped, choice = generator.random(), generator.random()
    if dropped < draws.uncond_dropout:
        return ""
    if shard.kinds[row] == "edit":
        return shard.prompts["instruction"][row]
    names = sorted(name for name, weight in draws.caption_weights.items() if weight > 0 and shard.prompts[name][row])
    edges = np.cumsum([draws.caption_weights[name] for name in names])
    return shard.prompts[names[int(np.searchsorted(edges, choice * edges[-1], side="right"))]][row] if names else ""


def tokens(latents: np.ndarray) -> Tensor:
    """(B, C, h, w) latents as (B, h w, C) tokens, row by row."""
    return torch.from_numpy(np.array(latents, order="C")).flatten(2).transpose(1, 2).contiguous()
