"""The autoencoder on this machine's CPU against diffusers' module: encode and decode with the same weights and pictures.

Prints one JSON line a measurement. Both run in turn, so that a machine whose speed drifts does so for both; who goes first
changes with each round. Figures are medians over rounds, and a ratio above one says that ours is faster.

    python -m benchmarks.vae
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderKLQwenImage21

from benchmarks.machine import machine
from model_core.models.vae_diffusers import from_diffusers

ROUNDS = 7
MULTIPLIERS = [1, 2, 4, 8, 8]


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def alternated(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float, float]:
    """Median seconds of both, and the median of theirs / ours a round; who goes first changes with each round."""
    pairs = []
    for number in range(ROUNDS + 1):
        first, second = (ours, theirs) if number % 2 else (theirs, ours)
        one, other = seconds(first), seconds(second)
        pairs.append((one, other) if number % 2 else (other, one))
    pairs = pairs[1:]  # the first round warms up
    return statistics.median(o for o, _ in pairs), statistics.median(t for _, t in pairs), statistics.median(t / o for o, t in pairs)


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
    for what, (our_work, their_work) in works.items():
        own, other, ratio = alternated(our_work, their_work)
        figures = {
            "measurement": f"{what} against diffusers",
            "size": size,
            "pictures": batch,
            "px": side_px,
            "milliseconds": round(own * 1e3, 1),
            "diffusers_milliseconds": round(other * 1e3, 1),
            "ratio": round(ratio, 2),
            "goal": 1.0,
            "largest_difference": (our_work() - their_work()).abs().max().item(),
        }
        print(json.dumps(figures), flush=True)


def main() -> None:
    """Measures both sizes."""
    print(json.dumps({"machine": machine()}))
    compare("tiny", (8, 12), batch=4, side_px=64)
    compare("middle", (32, 48), batch=1, side_px=128)


if __name__ == "__main__":
    main()
