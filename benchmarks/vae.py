"""The autoencoder on this machine's CPU against diffusers' module: encode and decode with the same weights and pictures.

Prints one JSON line a measurement. Both run in turn, so that a machine whose speed drifts does so for both; who goes first
changes with each round. Figures are medians over rounds, and a ratio above one says that ours is faster.

    python -m benchmarks.vae
"""

from __future__ import annotations

import json

import torch
from diffusers import AutoencoderKLQwenImage21

from benchmarks.against_diffusers import say_against_diffusers
from benchmarks.machine import machine
from model_core.models.vae_diffusers import from_diffusers

MULTIPLIERS = [1, 2, 4, 8, 8]


@torch.inference_mode()
def compare(size: str, widths: tuple[int, int], *, batch: int, side_px: int) -> None:
    """Says how fast both encode and decode random pictures of one size, with the same random weights."""
    torch.manual_seed(0)
    theirs = AutoencoderKLQwenImage21(base_dim=widths[0], decoder_base_dim=widths[1], dim_mult=MULTIPLIERS).eval()
    ours = from_diffusers(dict(theirs.config), theirs.state_dict())
    images = torch.rand(batch, 4, side_px, side_px) * 2 - 1
    latents = ours.encode(images)
    their_images, their_latents = images[:, :, None], latents[:, :, None]  # one frame
    works = {
        "encode": (lambda: ours.encode(images), lambda: theirs.encode(their_images).latent_dist.mode()[:, :, 0]),
        "decode": (lambda: ours.decode(latents).clamp(-1, 1), lambda: theirs.decode(their_latents).sample[:, :, 0]),
    }
    for what, pair in works.items():
        say_against_diffusers(what, *pair, pair, size=size, pictures=batch, px=side_px)


def main() -> None:
    """Measures both sizes."""
    print(json.dumps({"machine": machine()}))
    compare("tiny", (8, 12), batch=4, side_px=64)
    compare("middle", (32, 48), batch=1, side_px=128)


if __name__ == "__main__":
    main()
