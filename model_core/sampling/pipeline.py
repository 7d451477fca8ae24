"""From prompts to pictures: encode, integrate the guided flow, decode (R1: 40 steps with guidance)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from model_core.data.keys import keyed_generator
from model_core.models.condition import ConditionEncoder
from model_core.models.mmdit import MMDiT, reads_prefix_once
from model_core.models.segments import Grid, interleave, text_runs
from model_core.models.stream import pack, pack_prefix, pack_targets
from model_core.models.tiling import decode_pictures, encode_pictures
from model_core.models.vae import ResidualVAE
from model_core.objectives.flow import shift_mu
from model_core.objectives.guidance import guide
from model_core.recipe import CompressionRatio, Sampling
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
    sampling: Sampling,
    references: Sequence[Tensor] = (),
) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] for B prompts, each with its own seed, whatever else is in the batch.

    `size_px` is (H, W); from 2048 px a side on, the autoencoder works in tiles. `references`: for editing, one (B, 3, H', W')
    tensor a condition image; an encoder that sees images is shown them with each prompt, and with the empty one of guidance.
    Sides are multiples of the encoder's `multiple_px`.
    """
    if any(side % encoder.multiple_px for side in size_px):
        raise ValueError(f"size {size_px} is not a multiple of {encoder.multiple_px}")
    height, width = (side // CompressionRatio for side in size_px)
    branches = [*prompts] if sampling.guidance_scale == 1.0 else [*prompts, *[""] * len(prompts)]
    denoise = _denoiser(mmdit, vae, encoder, branches, references, (height, width))

    def velocity(x: Tensor, t: float) -> Tensor:
        if sampling.guidance_scale == 1.0:
            return denoise(x, t)
        conditional, unconditional = denoise(torch.cat((x, x)), t).chunk(2)
        return guide(conditional, unconditional, scale=sampling.guidance_scale, rescale_norm=sampling.rescale_norm)

    device = vae.latent_mean.device
    times = shifted_times(sampling.steps, mu=shift_mu(height * width, sampling.shift_mu), final_sigma=sampling.final_sigma)
    noise = [keyed_generator(seed, "sample").standard_normal((mmdit.latent_channels, height, width), dtype=np.float32) for seed in seeds]
    latents = euler(velocity, torch.from_numpy(np.stack(noise)).flatten(2).transpose(1, 2).to(device), times)
    grid = latents.transpose(1, 2).unflatten(2, (height, width))
    return decode_pictures(vae, vae.unstandardise(grid)).clamp(-1, 1).cpu()


def _denoiser(
    mmdit: MMDiT, vae: ResidualVAE, encoder: ConditionEncoder, prompts: Sequence[str], references: Sequence[Tensor], shape: Grid
) -> Callable[[Tensor, float], Tensor]:
    """(x (B, N, C), t) to velocities for B prompts that share the condition images: those are (P, 3, H, W) for P pictures, B a multiple.

    Text and condition images are read once where the model allows it.
    """
    seen = [[images[row % len(images)] for images in references] for row in range(len(prompts))] if encoder.sees_images else None
    encoded = encoder.encode_packed(prompts, seen)
    text, device = encoded.states.float(), encoded.states.device
    conditions = [_condition(vae, images) for images in references]
    pictures = [*(grid for _, grid in conditions), shape]
    samples = [interleave(text_runs(segments), pictures) for segments in encoded.segments]
    clean = [latents.repeat(len(prompts) // len(latents), 1, 1) for latents, _ in conditions]
    once = reads_prefix_once(mmdit.config)
    if once:
        read = torch.cat(clean, dim=1).flatten(0, 1) if clean else text.new_zeros(0, mmdit.latent_channels)
        with _fast_passes(device):
            prefix = mmdit.read_prefix(read, text, pack_prefix(samples, mmdit.config).to(device))
    stream = (pack_targets(samples, mmdit.config) if once else pack(samples, mmdit.config)).to(device)

    def denoise(x: Tensor, t: float) -> Tensor:
        times = x.new_full((len(x),), t)
        with _fast_passes(device):
            if once:
                velocity = mmdit(x.flatten(0, 1), x.new_zeros(0, mmdit.text_dim), times, stream, prefix=prefix)
            else:
                velocity = mmdit(torch.cat([*clean, x], dim=1).flatten(0, 1), text, times, stream)
        return velocity.to(x.dtype).unflatten(0, x.shape[:2])

    return denoise


def _fast_passes(device: torch.device) -> torch.autocast:
    """Passes in bfloat16 on a GPU; the latents that the solver carries stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _condition(vae: ResidualVAE, images: Tensor) -> tuple[Tensor, Grid]:
    """A condition image as tokens, and its shape in tokens."""
    latents = vae.standardise(encode_pictures(vae, images.to(vae.latent_mean.device)))
    return latents.flatten(2).transpose(1, 2), (latents.shape[2], latents.shape[3])
