"""Validation loss of the flow: fixed samples, fixed noise, eight equidistant times, so that two numbers can be compared.

As MLPerf's FLUX benchmark does it: times are dealt out round-robin by sample, and the result is the mean over times of the
means over samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from model_core.data.keys import keyed_generator
from model_core.data.latents import LatentGroup, floats
from model_core.data.loader import tokens
from model_core.data.plan import Rows
from model_core.data.row_groups import RowGroups
from model_core.models.condition import ConditionEncoder
from model_core.objectives.flow import flow_loss, interpolate, velocity_target

TIMES = tuple((index + 0.5) / 8 for index in range(8))
MAX_SAMPLES = 128  # a kind


@torch.inference_mode()
def validation_loss(
    model: nn.Module, encoder: ConditionEncoder, groups: RowGroups[LatentGroup], rows: dict[str, Rows], *, seed: int
) -> dict[str, float]:
    """Loss a kind on the held-out rows, of kinds that have at least one row for each time."""
    result = {}
    for kind, members in sorted(rows.items()):
        if members.total < len(TIMES):
            continue
        losses: dict[float, list[float]] = {time: [] for time in TIMES}
        for index, (group, row) in enumerate(_first(groups, members)):
            time = TIMES[index % len(TIMES)]
            noise = keyed_generator(seed, "validation", group.sample_ids[row]).standard_normal(group.latents.shape[1:], dtype=np.float32)
            latents, noise_tokens = tokens(floats(group.latents[row][None])), tokens(torch.from_numpy(noise[None]))
            t, shape = torch.tensor([time]), (group.bucket.height, group.bucket.width)
            text, mask = encoder.encode([group.prompts["instruction"][row] or group.prompts["general"][row]])
            references = [(tokens(floats(reference[None])), shape) for reference in group.references[row]]
            velocity = model(interpolate(latents, noise_tokens, t), t, text, mask, shape, references=references)
            losses[time].append(float(flow_loss(velocity, velocity_target(latents, noise_tokens))))
        result[kind] = float(np.mean([np.mean(values) for values in losses.values()]))
    return result


def _first(groups: RowGroups[LatentGroup], members: Rows) -> Iterator[tuple[LatentGroup, int]]:
    """The kind's first rows, in the order of the index."""
    num = 0
    for number in members.groups.tolist():
        group = groups.get(number)
        for row in range(len(group) if group is not None else 0):
            if num == MAX_SAMPLES:
                return
            num += 1
            assert group is not None
            yield group, row
