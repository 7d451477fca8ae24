"""Validation loss of the flow: fixed samples, fixed noise, eight equidistant times, so that two numbers can be compared.

As MLPerf's FLUX benchmark does it: times are dealt out round-robin by sample, and the result is the mean over times of the
means over samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from model_core.data.conditions import Condition, condition_of
from model_core.data.keys import keyed_generator
from model_core.data.latents import LatentGroup, floats
from model_core.data.loader import tokens
from model_core.data.plan import Rows
from model_core.data.row_groups import RowGroups
from model_core.models.condition import ConditionEncoder
from model_core.models.mmdit import MMDiT
from model_core.models.segments import interleave
from model_core.models.stream import pack
from model_core.objectives.flow import flow_loss, interpolate, velocity_target
from model_core.training.passes import text_states

TIMES = tuple((index + 0.5) / 8 for index in range(8))
MAX_SAMPLES = 128  # a kind


@torch.inference_mode()
def validation_loss(
    model: MMDiT, encoder: ConditionEncoder | None, groups: RowGroups[LatentGroup], rows: dict[str, Rows], *, seed: int, empty: Condition
) -> dict[str, float]:
    """Loss a kind on the held-out rows, of kinds that have at least one row for each time.

    Text states come from where training has them; `empty` is what a row without a prompt is conditioned on.
    """
    weight = next(model.parameters())
    result = {}
    for kind, members in sorted(rows.items()):
        if members.total < len(TIMES):
            continue
        losses: dict[float, list[float]] = {time: [] for time in TIMES}
        for index, (group, row) in enumerate(_first(groups, members)):
            time = TIMES[index % len(TIMES)]
            noise = keyed_generator(seed, "validation", group.sample_ids[row]).standard_normal(group.latents.shape[1:], dtype=np.float32)
            pictures = tokens(floats(np.concatenate((group.references[row], group.latents[row, None])))).flatten(0, 1)
            noise_tokens = tokens(torch.from_numpy(noise[None]))[0]
            latents = pictures[-len(noise_tokens) :].clone()
            pictures[-len(noise_tokens) :] = interpolate(latents, noise_tokens, torch.full((len(noise_tokens),), time))
            name = "instruction" if kind == "edit" else "general"
            condition = condition_of(group, row, name if group.prompts[name][row] else None, empty=empty)
            text = text_states(encoder, [condition.prompt], [condition.states], like=weight)
            sample = interleave(condition.runs, [(group.bucket.height, group.bucket.width)] * (group.bucket.num_references + 1))
            t, stream = torch.tensor([time], device=weight.device), pack([sample], model.config).to(weight.device)
            velocity = model(pictures.to(weight.device), text, t, stream).cpu()
            losses[time].append(float(flow_loss(velocity, velocity_target(latents, noise_tokens), num_elements=latents.numel())))
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
