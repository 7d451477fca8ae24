"""Batches for train_mmdit: a rank's share of the plan's samples, with their prompts, noise and timesteps.

Every draw is keyed by (seed, stage, sample id, epoch), so a sample meets the same noise on any number of ranks and workers and
after any number of restarts. Batches are made ahead by worker threads, and the row groups that the next window needs are
fetched one by one while this one is in use.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model_core.data.keys import keyed_generator
from model_core.data.latents import LatentGroup, floats
from model_core.data.plan import Plan
from model_core.data.row_groups import RowGroups
from model_core.objectives.flow import logit_normal
from model_core.training.distributed import ALONE, Ranks

BATCHES_AHEAD = 4


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
class Batch:
    """A rank's share of a global batch.

    `ids` are the samples in it, by kind and epoch; `missing` those that lie in quarantined row groups, as (row group, row).
    `tokens` are those of pictures and prompts, `padded_tokens` what the model computes for them.
    """

    micro_batches: list[MicroBatch]
    ids: dict[tuple[str, int], list[bytes]]
    missing: dict[tuple[str, int], list[tuple[int, int]]]
    tokens: int
    padded_tokens: int


@dataclass(frozen=True)
class Draws:
    """How a sample is drawn: p(t), the share that loses its prompt, and how often each caption type is taken.

    `empty_tokens` is how many states the condition encoder gives for no prompt at all.
    """

    logit_normal: tuple[float, float]
    uncond_dropout: float
    caption_weights: dict[str, float]
    empty_tokens: int = 0


@dataclass(frozen=True)
class Budget:
    """How a share is cut into micro-batches: at most `tokens` each with padding (None: no limit), of which `useful` are none."""

    tokens: int | None = None
    useful: float = 0.0


@dataclass
class Loader:
    """Makes a rank's share of any global batch, and streams those of a stretch of them.

    `workers` threads make batches ahead. `waited_seconds` is how long the training loop has stood still for data.
    """

    groups: RowGroups[LatentGroup]
    plan: Plan
    draws: Draws
    budget: Budget = Budget()
    ranks: Ranks = ALONE
    workers: int = 0
    waited_seconds: float = 0.0

    def stream(self, first: int, last: int) -> Iterator[Batch]:
        """Batches `first` to `last` - 1 in order, made ahead by the workers; without workers each is made when asked for."""
        if self.workers == 0:
            for number in range(first, last):
                began = time.monotonic()
                batch = self.batch(number)
                self.waited_seconds += time.monotonic() - began
                yield batch
            return
        with ThreadPoolExecutor(self.workers, "loader") as pool, ThreadPoolExecutor(self.workers, "fetch") as fetchers:
            ahead: deque[Future[Batch]] = deque()
            try:
                for number in range(first, last + BATCHES_AHEAD):
                    if number < last:
                        ahead.append(pool.submit(self.batch, number))
                        for group in self._coming(number, last):
                            fetchers.submit(self.groups.get, group)
                    if number >= first + BATCHES_AHEAD:
                        began = time.monotonic()
                        batch = ahead.popleft().result()
                        self.waited_seconds += time.monotonic() - began
                        yield batch
            finally:
                for future in ahead:
                    future.cancel()

    def batch(self, number: int) -> Batch:
        """This rank's share of global batch `number`, split by shape and budget."""
        samples = self.plan.share(number, rank=self.ranks.rank, size=self.ranks.size)
        drawn: dict[tuple[tuple[int, int], int], list[_Sample]] = defaultdict(list)
        ids: dict[tuple[str, int], list[bytes]] = defaultdict(list)
        missing: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        for group_number in dict.fromkeys(samples.groups.tolist()):
            mine = samples.take(samples.groups == group_number)
            group = self.groups.get(group_number)
            for kind, row, epoch in zip(mine.kinds.tolist(), mine.rows.tolist(), mine.epochs.tolist(), strict=True):
                if group is None:
                    missing[self.plan.kinds[kind], epoch].append((group_number, row))
                    continue
                sample = _draw(group, row, epoch, self.plan, self.draws)
                drawn[(group.bucket.height, group.bucket.width), group.bucket.num_references].append(sample)
                ids[self.plan.kinds[kind], epoch].append(group.sample_ids[row])
        cuts = [cut for bucket in sorted(drawn) for cut in cut_by_budget(drawn[bucket], self.budget)]
        return Batch(
            micro_batches=[_micro_batch(cut) for cut in cuts],
            ids=dict(ids),
            missing=dict(missing),
            tokens=sum(sample.tokens for cut in cuts for sample in cut),
            padded_tokens=sum(len(cut) * max(sample.tokens for sample in cut) for cut in cuts),
        )

    def _coming(self, number: int, last: int) -> list[int]:
        """Row groups that the window after this one needs and nobody has asked for yet: a few, so that reads spread evenly."""
        distance = max(1, int(min(self._window_batches())))
        if number + distance >= last:
            return []
        needed = np.unique(self.plan.share(number + distance, rank=self.ranks.rank, size=self.ranks.size).groups).tolist()
        num = 1 + len(needed) // distance
        return [group for group in needed if not self.groups.has(group)][:num]

    def _window_batches(self) -> list[float]:
        """How many batches a window lasts, a kind."""
        plan = self.plan
        return [
            plan.window * plan.rows[kind].total / len(plan.rows[kind].groups) / float(share * plan.batch_size)
            for kind, share in plan.shares.items()
        ]


@dataclass(frozen=True)
class _Sample:
    """One drawn sample; `tokens` are those of its pictures and its prompt."""

    group: LatentGroup
    row: int
    t: float
    prompt: str
    noise: np.ndarray
    tokens: int


def _draw(group: LatentGroup, row: int, epoch: int, plan: Plan, draws: Draws) -> _Sample:
    generator = keyed_generator(plan.seed, plan.stage, group.sample_ids[row], epoch)
    t = logit_normal(generator.standard_normal(), *draws.logit_normal)
    name = draw_prompt(group, row, draws, generator)
    return _Sample(
        group=group,
        row=row,
        t=t,
        prompt=group.prompts[name][row] if name else "",
        noise=generator.standard_normal(group.latents.shape[1:], dtype=np.float32),
        tokens=group.bucket.image_tokens + (int(group.prompt_tokens[name][row]) if name else draws.empty_tokens),
    )


def draw_prompt(group: LatentGroup, row: int, draws: Draws, generator: np.random.Generator) -> str | None:
    """Which prompt a sample meets: none with probability `uncond_dropout`; else an edit's instruction, or a drawn caption type."""
    dropped, choice = generator.random(), generator.random()
    if dropped < draws.uncond_dropout:
        return None
    if group.bucket.kind == "edit":
        return "instruction"
    names = sorted(name for name, weight in draws.caption_weights.items() if weight > 0 and group.prompts[name][row])
    edges = np.cumsum([draws.caption_weights[name] for name in names])
    return names[int(np.searchsorted(edges, choice * edges[-1], side="right"))] if names else None


def cut_by_budget(samples: Sequence[_Sample], budget: Budget) -> list[list[_Sample]]:
    """Samples of one shape, longest prompt first, cut where the next one would exceed the budget or waste too much padding."""
    cuts: list[list[_Sample]] = []
    useful = 0
    for sample in sorted(samples, key=lambda sample: (-sample.tokens, sample.group.sample_ids[sample.row])):
        if cuts:
            padded = (len(cuts[-1]) + 1) * cuts[-1][0].tokens
            within = budget.tokens is None or padded <= budget.tokens
            if within and useful + sample.tokens >= budget.useful * padded:
                cuts[-1].append(sample)
                useful += sample.tokens
                continue
        cuts.append([sample])
        useful = sample.tokens
    return cuts


def _micro_batch(samples: list[_Sample]) -> MicroBatch:
    first = samples[0].group.bucket
    references = np.stack([sample.group.references[sample.row] for sample in samples])
    return MicroBatch(
        latents=tokens(floats(np.stack([sample.group.latents[sample.row] for sample in samples]))),
        noise=tokens(torch.from_numpy(np.stack([sample.noise for sample in samples]))),
        references=[tokens(floats(references[:, slot])) for slot in range(references.shape[1])],
        t=torch.tensor([sample.t for sample in samples], dtype=torch.float32),
        prompts=[sample.prompt for sample in samples],
        shape=(first.height, first.width),
    )


def tokens(latents: Tensor) -> Tensor:
    """(B, C, h, w) latents as (B, h w, C) tokens, row by row."""
    return latents.flatten(2).transpose(1, 2).contiguous()
