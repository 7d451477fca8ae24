"""Validation loss of the flow: fixed samples, fixed noise, eight equidistant times, so that two numbers can be compared.

As MLPerf's FLUX benchmark does it: times are dealt out round-robin by sample, and the result is the mean over times of the
means over samples.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from model_core.data.keys import keyed_generator
from model_core.data.loader import LatentRows, tokens
from model_core.data.plan import Draw
from model_core.models.condition import ConditionEncoder
from model_core.objectives.flow import flow_loss, interpolate, velocity_target

TIMES = tuple((index + 0.5) / 8 for index in range(8))
MAX_SAMPLES = 128  # a kind


@torch.inference_mode()
def validation_loss(model: nn.Module, encoder: ConditionEncoder, rows: LatentRows, *, seed: int) -> dict[str, float]:
    """Loss a kind on the held-out rows, of kinds that have at least one row for each time."""
    result = {}
    for kind, size in sorted(rows.sizes.items()):
        if size < len(TIMES):
            continue
        losses: dict[float, list[float]] = {time: [] for time in TIMES}
        for index in range(min(size, MAX_SAMPLES)):
            shard_index, row = rows.locate(Draw(kind, index, 0))
            shard = rows.shards[shard_index]
            time = TIMES[index % len(TIMES)]
            noise = keyed_generator(seed, "validation", shard.sample_ids[row]).standard_normal(shard.latents.shape[1:], dtype=np.float32)
            latents, noise_tokens, t = tokens(shard.latents[row][None]), tokens(noise[None]), torch.tensor([time])
            prompt = shard.prompts["instruction"][row] or shard.prompts["general"][row]
            text, mask = encoder.encode([prompt])
            references = [(tokens(shard.references[row, slot][None]), shard.shape) for slot in range(shard.references.shape[1])]
            velocity = model(interpolate(latents, noise_tokens, t), t, text, mask, shard.shape, references=references)
            losses[time].append(float(flow_loss(velocity, velocity_target(latents, noise_tokens))))
        result[kind] = float(np.mean([np.mean(values) for values in losses.values()]))
    return result
