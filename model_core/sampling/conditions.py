"""What B pictures of one shape are conditioned on, and the velocity that a model gives them: for samplers and for what learns from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_core.models.condition import ConditionEncoder
from model_core.models.mmdit import MMDiT, reads_prefix_once
from model_core.models.segments import Grid, Sample, interleave, text_runs
from model_core.models.stream import pack, pack_prefix, pack_targets
from model_core.models.tiling import encode_pictures
from model_core.models.vae import ResidualVAE

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x (B, N, C), t (B,)) to (B, N, C)


@dataclass(frozen=True)
class Conditions:
    """Of B samples: `text` states (L, dim) and stream `segments` of each; clean latents of their sources, `images` (B, I, C)."""

    text: Sequence[Tensor]
    segments: Sequence[Sample]
    images: Tensor

    def __len__(self) -> int:
        return len(self.text)

    def rows(self, chosen: Sequence[int]) -> Conditions:
        """Those of some samples; a sample may come more than once."""
        return Conditions([self.text[row] for row in chosen], [self.segments[row] for row in chosen], self.images[list(chosen)])


def join(parts: Sequence[Conditions]) -> Conditions:
    """The samples of all parts, which have condition images of one shape."""
    return Conditions(
        [text for part in parts for text in part.text],
        [sample for part in parts for sample in part.segments],
        torch.cat([part.images for part in parts]),
    )


@torch.no_grad()
def encode_conditions(
    vae: ResidualVAE, encoder: ConditionEncoder, prompts: Sequence[str], references: Sequence[Tensor], *, shape: Grid
) -> Conditions:
    """Conditions of B prompts for pictures of `shape` in latents.

    `references`: one (P, 3, H, W) tensor a condition image, B a multiple of P. The prompts may be several
    rounds over the P samples: with guidance, each prompt, then the empty one for each.
    """
    seen = [[images[row % len(images)] for images in references] for row in range(len(prompts))] if encoder.sees_images else None
    encoded = encoder.encode_packed(prompts, seen)
    text = encoded.states.float()
    latents = [vae.standardise(encode_pictures(vae, images.to(vae.latent_mean.device))) for images in references]
    pictures = [*((grid.shape[2], grid.shape[3]) for grid in latents), shape]
    tokens = [grid.flatten(2).transpose(1, 2).repeat(len(prompts) // len(grid), 1, 1) for grid in latents]
    images = torch.cat(tokens, dim=1) if tokens else text.new_zeros(len(prompts), 0, vae.latent_mean.numel())
    return Conditions(
        list(text.split(encoded.lengths)), [interleave(text_runs(segments), pictures) for segments in encoded.segments], images
    )


def velocity(mmdit: MMDiT, conditions: Conditions) -> Velocity:
    """The model's velocities for states (B, N, C) at times (B,), each pass over the whole stream: gradients reach all parameters."""
    device = conditions.images.device
    text = torch.cat(list(conditions.text))
    stream = pack(conditions.segments, mmdit.config).to(device)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        with _fast_passes(device):
            found = mmdit(torch.cat((conditions.images, x), dim=1).flatten(0, 1), text, t, stream)
        return found.to(x.dtype).unflatten(0, x.shape[:2])

    return denoise


@torch.no_grad()
def sampling_velocity(mmdit: MMDiT, conditions: Conditions) -> Velocity:
    """The same without gradients; text and condition images are read once where the model allows it."""
    if not reads_prefix_once(mmdit.config):
        return torch.no_grad()(velocity(mmdit, conditions))
    device = conditions.images.device
    text = torch.cat(list(conditions.text))
    with _fast_passes(device):
        prefix = mmdit.read_prefix(conditions.images.flatten(0, 1), text, pack_prefix(conditions.segments, mmdit.config).to(device))
    stream = pack_targets(conditions.segments, mmdit.config).to(device)

    @torch.no_grad()
    def denoise(x: Tensor, t: Tensor) -> Tensor:
        with _fast_passes(device):
            found = mmdit(x.flatten(0, 1), x.new_zeros(0, mmdit.text_dim), t, stream, prefix=prefix)
        return found.to(x.dtype).unflatten(0, x.shape[:2])

    return denoise


def _fast_passes(device: torch.device) -> torch.autocast:
    """Passes in bfloat16 on a GPU; the latents that the solver carries stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
