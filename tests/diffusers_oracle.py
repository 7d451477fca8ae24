"""A model's latents by this project's sampler, and by diffusers' own transformer and scheduler from the folder it was exported to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImage21Transformer2DModel
from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_shift
from torch import Tensor

from model_core.evaluation.drawing import Painter
from model_core.models.segments import Segment, interleave, num_tokens, text_runs
from model_core.models.tiling import encode_pictures
from model_core.sampling import pipeline

SEEDS = [3, 4]


def latents_of(
    monkeypatch: pytest.MonkeyPatch, model: Painter, references: list[Tensor], *, prompts: list[str], size_px: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The sampler's noise and its last latents, each (B, N, C), and what it decodes them to is left alone."""
    seen: list[Tensor] = []
    decode, euler = pipeline.decode_pictures, pipeline.euler
    monkeypatch.setattr(pipeline, "euler", lambda velocity, x, times: seen.append(x) or euler(velocity, x, times))
    monkeypatch.setattr(pipeline, "decode_pictures", lambda vae, latents: seen.append(latents) or decode(vae, latents))
    pipeline.sample(
        model.mmdit, model.vae, model.encoder, prompts, size_px=size_px, seeds=SEEDS, sampling=model.sampling, references=references
    )
    noise, raw = seen
    return noise, model.vae.standardise(raw).flatten(2).transpose(1, 2)


@torch.inference_mode()
def public_latents(
    folder: Path,
    model: Painter,
    noise: Tensor,
    references: list[Tensor],
    *,
    prompts: list[str],
    size_px: tuple[int, int],
) -> Tensor:
    """Euler steps of diffusers' transformer and scheduler with guidance, on one sample at a time."""
    transformer = QwenImage21Transformer2DModel.from_pretrained(folder / "transformer", local_files_only=True).eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    conditions = [model.vae.standardise(encode_pictures(model.vae, images)) for images in references]
    config, count = scheduler.config, noise.shape[1]
    sides = (size_px[0] // 16, size_px[1] // 16)
    mu = calculate_shift(count, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    sigmas = torch.linspace(1, 1 / model.sampling.steps, model.sampling.steps).tolist()
    shapes = [[(1, condition.shape[2], condition.shape[3]) for condition in conditions] + [(1, *sides)]]
    drawn = []
    for number, text in enumerate(prompts):
        scheduler.set_timesteps(sigmas=sigmas, mu=mu)
        clean = [condition[number : number + 1].flatten(2).transpose(1, 2) for condition in conditions]
        x = noise[number : number + 1]
        for t in scheduler.timesteps:
            velocities = []
            for prompt in (text, ""):
                shown = [[images[number] for images in references]] if model.encoder.sees_images else None
                encoded = model.encoder.encode_packed([prompt], shown)
                grids = [(condition.shape[2], condition.shape[3]) for condition in conditions]
                segments = interleave(text_runs(encoded.segments[0]), [*grids, sides])
                is_slot = torch.cat([torch.full((_slots(segment),), not isinstance(segment, int)) for segment in segments])
                held = len(is_slot) - count // 4
                states = encoded.states.new_zeros(held, encoded.states.shape[1])
                states[~is_slot[:held]] = encoded.states
                velocity = transformer(
                    hidden_states=torch.cat([*clean, x], dim=1),
                    encoder_hidden_states=states[None],
                    timestep=t[None] / 1000,
                    img_shapes=shapes,
                    img_mask=is_slot[None],
                ).sample[:, -count:]
                velocities.append(velocity)
            conditional, unconditional = velocities
            guided = unconditional + model.sampling.guidance_scale * (conditional - unconditional)
            x = scheduler.step(guided, t, x).prev_sample
        drawn.append(x)
    return torch.cat(drawn)


def _slots(segment: Segment) -> int:
    """Places in the vision-language sequence: one a text token, one for 2 x 2 latent tokens of a picture."""
    return segment if isinstance(segment, int) else num_tokens(segment) // 4
