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
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from model_core.data.conditions import Condition, condition_of
from model_core.data.keys import keyed_generator
from model_core.data.latents import LatentGroup, floats
from model_core.data.plan import Plan
from model_core.data.row_groups import RowGroups
from model_core.models.segments import Sample, interleave
from model_core.models.stream import Stream, pack
from model_core.objectives.flow import logit_normal, shift_mu, shift_time
from model_core.recipe import MMDiTModel
from model_core.training.distributed import ALONE, Ranks

BATCHES_AHEAD = 4
NO_TEXT = Condition("", (0,))


@dataclass(frozen=True)
class MicroBatch:
    """Samples packed into one stream: what one pass of the model takes.

    `pictures` (I, C): all picture tokens, clean, in the order of the stream; `noise` (N, C) for the target tokens, which
    `is_target` (I,) marks; `t` (B,); B prompts, the B `samples` as segments, and for each its stored text `states` (L, dim)
    bfloat16, or None where the condition encoder is to run on the prompt.
    """

    pictures: Tensor
    noise: Tensor
    is_target: Tensor
    t: Tensor
    prompts: list[str]
    states: list[Tensor | None]
    samples: list[Sample]
    stream: Stream

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("pictures", "noise", "is_target", "t")}
        return replace(self, **moved, stream=self.stream.to(device))


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch.

    `ids` are the samples in it, by kind and epoch; `missing` those that lie in quarantined row groups, as (row group, row).
    `num_elements` are the values that the loss is taken over.
    """

    micro_batches: list[MicroBatch]
    ids: dict[tuple[str, int], list[bytes]]
    missing: dict[tuple[str, int], list[tuple[int, int]]]

    @property
    def num_elements(self) -> int:
        """Values that this share's loss is a sum over."""
        return sum(micro.noise.numel() for micro in self.micro_batches)

    @property
    def num_tokens(self) -> int:
        """Tokens of all streams."""
        return sum(len(micro.stream) for micro in self.micro_batches)


@dataclass(frozen=True)
class Draws:
    """How a sample is drawn: p(t), the share that loses its prompt, and how often each caption type is taken.

    `shift_mu` at 256 and 8192 target tokens moves t towards noise (None: not at all). `empty` is what a sample without a
    prompt is conditioned on.
    """

    logit_normal: tuple[float, float]
    uncond_dropout: float
    caption_weights: dict[str, float]
    shift_mu: tuple[float, float] | None = None
    empty: Condition = NO_TEXT


@dataclass
class Loader:
    """Makes a rank's share of any global batch, and streams those of a stretch of them.

    A share is packed into streams of at most `token_budget` tokens (None: one stream). `workers` threads make batches ahead.
    `waited_seconds` is how long the training loop has stood still for data.
    """

    groups: RowGroups[LatentGroup]
    plan: Plan
    draws: Draws
    model: MMDiTModel
    token_budget: int | None = None
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
        """This rank's share of global batch `number`, packed by the token budget."""
        samples = self.plan.share(number, rank=self.ranks.rank, size=self.ranks.size)
        drawn: list[_Sample] = []
        ids: dict[tuple[str, int], list[bytes]] = defaultdict(list)
        missing: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        for group_number in dict.fromkeys(samples.groups.tolist()):
            mine = samples.take(samples.groups == group_number)
            group = self.groups.get(group_number)
            for kind, row, epoch in zip(mine.kinds.tolist(), mine.rows.tolist(), mine.epochs.tolist(), strict=True):
                if group is None:
                    missing[self.plan.kinds[kind], epoch].append((group_number, row))
                    continue
                drawn.append(_draw(group, row, epoch, self.plan, self.draws))
                ids[self.plan.kinds[kind], epoch].append(group.sample_ids[row])
        packs = first_fit([sample.num_tokens for sample in drawn], budget=self.token_budget)
        return Batch([_micro_batch([drawn[index] for index in pack], self.model) for pack in packs], dict(ids), dict(missing))

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
    """One drawn sample."""

    group: LatentGroup
    row: int
    t: float
    condition: Condition
    noise: np.ndarray

    @property
    def segments(self) -> Sample:
        """Runs of text and condition images, target last."""
        bucket = self.group.bucket
        return interleave(self.condition.runs, [(bucket.height, bucket.width)] * (bucket.num_references + 1))

    @property
    def num_tokens(self) -> int:
        return sum(self.condition.runs) + self.group.bucket.image_tokens


def _draw(group: LatentGroup, row: int, epoch: int, plan: Plan, draws: Draws) -> _Sample:
    generator = keyed_generator(plan.seed, plan.stage, group.sample_ids[row], epoch)
    t = logit_normal(generator.standard_normal(), *draws.logit_normal)
    if draws.shift_mu is not None:
        t = shift_time(t, mu=shift_mu(group.bucket.height * group.bucket.width, draws.shift_mu))
    name = draw_prompt(group, row, draws, generator)
    return _Sample(
        group=group,
        row=row,
        t=t,
        condition=condition_of(group, row, name, empty=draws.empty),
        noise=generator.standard_normal(group.latents.shape[1:], dtype=np.float32),
    )


def draw_prompt(group: LatentGroup, row: int, draws: Draws, generator: np.random.Generator) -> str | None:
    """Which prompt a sample meets: none with probability `uncond_dropout`; else an edit's instruction, or a drawn caption type.

    A prompt without words is none.
    """
    dropped, choice = generator.random(), generator.random()
    if dropped < draws.uncond_dropout:
        return None
    if group.bucket.kind == "edit":
        return "instruction" if group.prompts["instruction"][row] else None
    names = sorted(name for name, weight in draws.caption_weights.items() if weight > 0 and group.prompts[name][row])
    edges = np.cumsum([draws.caption_weights[name] for name in names])
    return names[int(np.searchsorted(edges, choice * edges[-1], side="right"))] if names else None


def first_fit(lengths: Sequence[int], *, budget: int | None) -> list[list[int]]:
    """Indices packed by first-fit decreasing, so that each pack's lengths sum to at most `budget`; longer ones go alone.

    The order of equal lengths is kept, and so is the order within a pack.
    """
    if budget is None:
        return [list(range(len(lengths)))] if lengths else []
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fits = next((pack for pack, left in enumerate(room) if lengths[index] <= left), None)
        if fits is None:
            packs.append([index])
            room.append(budget - lengths[index])
        else:
            packs[fits].append(index)
            room[fits] -= lengths[index]
    return [sorted(pack) for pack in packs]


def _micro_batch(drawn: Sequence[_Sample], model: MMDiTModel) -> MicroBatch:
    pictures, is_target = [], []
    for sample in drawn:
        latents = np.concatenate((sample.group.references[sample.row], sample.group.latents[sample.row, None]))
        pictures.append(tokens(floats(latents)).flatten(0, 1))
        is_target += [False] * (len(latents) - 1) * latents[0, 0].size + [True] * latents[0, 0].size
    samples = [sample.segments for sample in drawn]
    return MicroBatch(
        pictures=torch.cat(pictures),
        noise=torch.cat([tokens(torch.from_numpy(sample.noise)[None])[0] for sample in drawn]),
        is_target=torch.tensor(is_target),
        t=torch.tensor([sample.t for sample in drawn], dtype=torch.float32),
        prompts=[sample.condition.prompt for sample in drawn],
        states=[sample.condition.states for sample in drawn],
        samples=samples,
        stream=pack(samples, model),
    )


def tokens(latents: Tensor) -> Tensor:
    """(B, C, h, w) latents as (B, h w, C) tokens, row by row."""
    return latents.flatten(2).transpose(1, 2).contiguous()
