"""From prompts to pictures: encode, integrate the guided flow, decode (R1: 40 steps with guidance)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model_core.data.keys import keyed_generator
from model_core.models.condition import ConditionEncoder
from model_core.models.mmdit import MMDiT
from model_core.models.tiling import decode_pictures, encode_pictures
from model_core.models.vae import ResidualVAE
from model_core.objectives.guidance import guide
from model_core.recipe import CompressionRatio, Sampling
from model_core.sampling.ode import euler
from model_core.sampling.schedule import shift_mu, shifted_times


@torch.inference_mode()
def sample(
    mmdit: MMDiT,
    vae: ResidualVAE,
    encoder: ConditionEncoder,
    prompts: Sequence[str],
    *,
    size_px: tuple[int, int],
    seeds: Sequence[int],
    sampling: Sampling,
    references: Sequence[Tensor] = (),
) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] for B prompts, each with its own seed, whatever else is in the batch.

    `size_px` is (H, W), multiples of 16; from 2048 px a side on, the autoencoder works in tiles. `references`: for editing, one
    (B, 3, H', W') tensor a condition image.
    """
    height, width = (side // CompressionRatio for side in size_px)
    if (height * CompressionRatio, width * CompressionRatio) != tuple(size_px):
        raise ValueError(f"size {size_px} is not a multiple of {CompressionRatio}")
    conditions = [_condition(vae, images) for images in references]
    text, text_mask = encoder.encode(list(prompts))
    empty, empty_mask = encoder.encode([""] * len(prompts))

    def velocity(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(prompts),), t)
        conditional = mmdit(x, times, text, text_mask, (height, width), references=conditions)
        if sampling.guidance_scale == 1.0:
            return conditional
        unconditional = mmdit(x, times, empty, empty_mask, (height, width), references=conditions)
        return guide(conditional, unconditional, scale=sampling.guidance_scale, rescale_norm=sampling.rescale_norm)

    times = shifted_times(sampling.steps, mu=shift_mu(height * width, sampling.shift_mu), final_sigma=sampling.final_sigma)
    noise = [keyed_generator(seed, "sample").standard_normal((mmdit.latent_channels, height, width), dtype=np.float32) for seed in seeds]
    latents = euler(velocity, torch.from_numpy(np.stack(noise)).flatten(2).transpose(1, 2), times)
    grid = latents.transpose(1, 2).unflatten(2, (height, width))
    return decode_pictures(vae, vae.unstandardise(grid)).clamp(-1, 1)


def _condition(vae: ResidualVAE, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """A condition image as tokens, and its shape in tokens."""
    latents = vae.standardise(encode_pictures(vae, images))
    return latents.flatten(2).transpose(1, 2), (latents.shape[2], latents.shape[3])
