"""Training steps of the demo on this machine: samples a second, and the share of the machine's own matrix speed they reach.

Prints one JSON line a measurement. Each round runs the baseline (one large fp32 matrix product) and the steps in turn, so that
a machine whose speed drifts does so for both; figures are medians over rounds.

    python -m benchmarks.training_steps
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import machine
from model_core.models.mmdit import MMDiT
from model_core.models.stream import pack
from model_core.models.vae import ResidualVAE
from model_core.objectives.flow import flow_loss, interpolate, velocity_target
from model_core.recipe import load_recipe

ROUNDS = 7
MATRIX = 1024
TEXT_TOKENS, TEXT_DIM = 20, 128


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Measures the demo's two training steps."""
    print(json.dumps({"machine": machine()}))
    recipe = load_recipe(Path("pipelines/recipes/demo.yaml"))
    torch.manual_seed(0)
    matrix = torch.randn(MATRIX, MATRIX)
    vae = ResidualVAE(recipe.vae.model)
    images = torch.rand(recipe.vae.batch_size, 3, recipe.vae.crop_px, recipe.vae.crop_px) * 2 - 1
    batch = next(iter(recipe.mmdit.stages.values())).batch_size
    mmdit = MMDiT(recipe.mmdit.model, latent_channels=recipe.vae.model.latent_channels, text_dim=TEXT_DIM)
    x0, noise, t = torch.randn(batch * 16, 64), torch.randn(batch * 16, 64), torch.rand(batch)
    text, stream = torch.randn(batch * TEXT_TOKENS, TEXT_DIM), pack([(TEXT_TOKENS, (4, 4))] * batch, recipe.mmdit.model)

    def vae_step() -> None:
        (vae.decode(vae.encode(images)) - images).abs().mean().backward()

    def mmdit_step() -> None:
        velocity = mmdit(interpolate(x0, noise, t.repeat_interleave(16)), text, t, stream)
        flow_loss(velocity, velocity_target(x0, noise), num_elements=x0.numel()).backward()

    for name, step, samples in (("train_vae", vae_step, len(images)), ("train_mmdit", mmdit_step, batch)):
        with FlopCounterMode(display=False) as counter:
            step()
        times = [(seconds(lambda: matrix @ matrix), seconds(step)) for _ in range(ROUNDS)]
        speed = statistics.median(counter.get_total_flops() / own / (2 * MATRIX**3 / base) for base, own in times)
        rate = statistics.median(samples / own for _, own in times)
        print(
            json.dumps(
                {
                    "step": name,
                    "threads": torch.get_num_threads(),
                    "samples_per_second": round(rate, 1),
                    "gflop_per_sample": round(counter.get_total_flops() / samples / 1e9, 3),
                    "share_of_matmul_speed": round(speed, 3),
                }
            )
        )


if __name__ == "__main__":
    main()
