"""From prompts to pictures: encode, integrate the guided flow or take a student's few steps, decode (R1: 40 steps with guidance, or 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from model_core.data.keys import keyed_generator
from model_core.models.condition import ConditionEncoder
from model_core.models.mmdit import MMDiT
from model_core.models.tiling import decode_pictures
from model_core.models.vae import ResidualVAE
from model_core.objectives.flow import shift_mu
from model_core.objectives.guidance import guide
from model_core.recipe import CompressionRatio, Sampling
from model_core.sampling.conditions import Velocity, encode_conditions, sampling_velocity
from model_core.sampling.few_step import FewStep, few_step
from model_core.sampling.ode import euler
from model_core.sampling.schedule import shifted_times


@torch.inference_mode()
def sample(
    mmdit: MMDiT,
    vae: ResidualVAE,
    encoder: ConditionEncoder,
    prompts: Sequence[str],
    *,
    size_px: tuple[int, int],
    seeds: Sequence[int],
    sampling: Sampling | FewStep,
    references: Sequence[Tensor] = (),
) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] for B prompts, each with its own seed, whatever else is in the batch.

    `sampling` of a flow, or the student's own sampler, which is not guided; both begin at the same noise for the same seed.
    `size_px` is (H, W); from 2048 px a side on, the autoencoder works in tiles. `references`: for editing, one (B, 3, H', W')
    tensor a condition image; an encoder that sees images is shown them with each prompt, and with the empty one of guidance.
    Sides are multiples of the encoder's `multiple_px`.
    """
    if any(side % encoder.multiple_px for side in size_px):
        raise ValueError(f"size {size_px} is not a multiple of {encoder.multiple_px}")
    height, width = (side // CompressionRatio for side in size_px)
    guided = isinstance(sampling, Sampling) and sampling.guidance_scale != 1.0
    branches = [*prompts, *[""] * len(prompts)] if guided else [*prompts]
    conditions = encode_conditions(vae, encoder, branches, references, shape=(height, width))
    denoise = sampling_velocity(mmdit, conditions)

    def noise(*key: object) -> Tensor:
        shape = (mmdit.latent_channels, height, width)
        drawn = [keyed_generator(seed, "sample", *key).standard_normal(shape, dtype=np.float32) for seed in seeds]
        return torch.from_numpy(np.stack(drawn)).flatten(2).transpose(1, 2).to(vae.latent_mean.device)

    if isinstance(sampling, FewStep):
        student_times = sampling.times(height * width)
        latents = few_step(_at_one_time(denoise), noise(), student_times, step_noise=lambda step: noise("step", step)).float()
    else:
        times = shifted_times(sampling.steps, mu=shift_mu(height * width, sampling.shift_mu), final_sigma=sampling.final_sigma)
        latents = euler(guided_velocity(denoise, sampling), noise(), times)
    grid = latents.transpose(1, 2).unflatten(2, (height, width))
    return decode_pictures(vae, vae.unstandardise(grid)).clamp(-1, 1).cpu()


def guided_velocity(denoise: Velocity, sampling: Sampling) -> Callable[[Tensor, float], Tensor]:
    """The velocity that a sampler follows, of x (B, N, C) and t. With guidance `denoise` knows B samples with prompts, then B without."""
    if sampling.guidance_scale == 1.0:
        return _at_one_time(denoise)

    def velocity(x: Tensor, t: float) -> Tensor:
        conditional, unconditional = denoise(torch.cat((x, x)), x.new_full((2 * len(x),), t)).chunk(2)
        return guide(conditional, unconditional, scale=sampling.guidance_scale, rescale_norm=sampling.rescale_norm)

    return velocity


def _at_one_time(denoise: Velocity) -> Callable[[Tensor, float], Tensor]:
    """The velocity of x (B, N, C) when all samples are at time t."""
    return lambda x, t: denoise(x, x.new_full((len(x),), t))
