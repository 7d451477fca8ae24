"""The packed stream: text, condition images and noisy targets of many samples, one after another and without padding.

A sample is a tuple of segments in the order in which they are read: a number stands for so many text tokens, a pair (h, w) for
a picture of that many tokens; the last picture is the target. Legend: B samples, T text tokens, I picture tokens, S = T + I.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from model_core.models.attention import AttentionPlan, Look, plan_attention
from model_core.models.rope import sample_positions
from model_core.models.segments import Sample, num_tokens, text_runs
from model_core.recipe import MMDiTModel


@dataclass(frozen=True)
class Stream:
    """Where each of S tokens comes from and belongs.

    `order` (S,): its place in the text tokens followed by the picture tokens; `sample` (S,): its sample; `is_target` (S,);
    `positions` (S, 3) for the rotary embedding; `plan`: who looks at whom.
    """

    order: Tensor
    sample: Tensor
    is_target: Tensor
    positions: Tensor
    plan: AttentionPlan

    def __len__(self) -> int:
        return len(self.order)

    def to(self, device: torch.device) -> Stream:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("order", "sample", "is_target", "positions")}
        return Stream(**moved, plan=self.plan.to(device))

    def part(self, rank: int, size: int) -> Stream:
        """The tokens of one rank of a context-parallel group, contiguous; the plan stays that of the whole stream."""
        mine = slice(rank * len(self) // size, (rank + 1) * len(self) // size)
        return replace(
            self, order=self.order[mine], sample=self.sample[mine], is_target=self.is_target[mine], positions=self.positions[mine]
        )


def pack(samples: Sequence[Sample], config: MMDiTModel) -> Stream:
    """The stream of whole samples. Raises ValueError for a sample that does not end in a picture."""
    for sample in samples:
        if not sample or isinstance(sample[-1], int):
            raise ValueError(f"found a sample of segments {sample}; the last must be the target, a pair (h, w)")
    positions = np.concatenate([sample_positions(sample, scheme=config.rope_positions) for sample in samples])
    is_target = np.concatenate([_marks_last(sample) for sample in samples])
    return _stream(samples, config, positions, is_target)


def pack_prefix(samples: Sequence[Sample], config: MMDiTModel) -> Stream:
    """The stream of samples without their targets, at the places that they have in the whole: what `read_prefix` takes."""
    whole = pack(samples, config)
    clean = ~whole.is_target.numpy()
    return _stream([sample[:-1] for sample in samples], config, whole.positions.numpy()[clean], np.zeros(int(clean.sum()), dtype=bool))


def pack_targets(samples: Sequence[Sample], config: MMDiTModel) -> Stream:
    """The stream of the targets alone, which look at their own sample's prefix too: keys are all prefixes', then all targets'."""
    whole = pack(samples, config)
    prefix_ends = np.cumsum([0, *(sum(map(num_tokens, sample[:-1])) for sample in samples)])
    target_ends = np.cumsum([0, *(num_tokens(sample[-1]) for sample in samples)])
    looks = []
    for index in range(len(samples)):
        own = np.arange(target_ends[index], target_ends[index + 1])
        looks.append(Look(own, np.concatenate((np.arange(prefix_ends[index], prefix_ends[index + 1]), own + prefix_ends[-1]))))
    return Stream(
        order=torch.arange(int(target_ends[-1])),
        sample=whole.sample[whole.is_target],
        is_target=whole.is_target[whole.is_target],
        positions=whole.positions[whole.is_target],
        plan=plan_attention(looks),
    )


def _stream(samples: Sequence[Sample], config: MMDiTModel, positions: np.ndarray, is_target: np.ndarray) -> Stream:
    text, picture = 0, sum(run for sample in samples for run in text_runs(sample))
    place = 0
    order, looks = [], []
    for sample in samples:
        start = place
        for segment in sample:
            length = num_tokens(segment)
            if isinstance(segment, int):
                order.append(np.arange(text, text + length))
                text += length
            else:
                order.append(np.arange(picture, picture + length))
                picture += length
            if config.attention == "block_causal":
                looks.append(Look(np.arange(place, place + length), np.arange(start, place + length), causal=isinstance(segment, int)))
            place += length
        if config.attention == "full":
            looks.append(Look(np.arange(start, place), np.arange(start, place)))
    lengths = [sum(map(num_tokens, sample)) for sample in samples]
    return Stream(
        order=torch.from_numpy(np.concatenate(order)),
        sample=torch.from_numpy(np.repeat(np.arange(len(samples)), lengths)),
        is_target=torch.from_numpy(is_target),
        positions=torch.from_numpy(positions),
        plan=plan_attention(looks, lengths=lengths if config.attention == "full" else None),
    )


def _marks_last(sample: Sample) -> np.ndarray:
    lengths = [num_tokens(segment) for segment in sample]
    return np.arange(sum(lengths)) >= sum(lengths[:-1])
