"""train_vae: the f16c64 residual autoencoder (R1 3.1, R2): reconstruction and relaxing semantic alignment, no GAN, no KL.

Takes the kept rows and the raw shards; leaves the EMA weights in `vae/` with the latents' channel statistics, the curves,
and `reconstructions.png`. Resumes bitwise from its newest checkpoint.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from model_core.context import StepContext
from model_core.data.buckets import fit
from model_core.data.keys import keyed_generator
from model_core.data.pixels import image_bytes, image_tensor, tensor_image
from model_core.data.shards import decode_image, read_kept_rows
from model_core.evaluation.reconstruction import psnr, ssim
from model_core.models.vae import ResidualVAE, load_vae, save_vae
from model_core.objectives.autoencoding import alignment_loss, edge_loss, gradient_features, relaxed
from model_core.recipe import VAE, CompressionRatio, UserError
from model_core.training.curves import Curves
from model_core.training.ema import ema_of, update_ema
from model_core.training.optim import Optimizer

LOG_EVERY_STEPS = 20
STATISTICS_IMAGES = 1024
SCORED_IMAGES = 256
SHOWN_IMAGES = 8
TEACHER_CHANNELS = 15


def run(context: StepContext) -> dict[str, Any]:
    """Trains to the end; returns held-out scores, counts and times."""
    config, seed = context.recipe.vae, context.recipe.seed
    began = time.monotonic()
    images, held_out = _read_images(context, config.crop_px)
    read_seconds = time.monotonic() - began

    torch.use_deterministic_algorithms(True)
    model = _Trained(_initial_vae(config, seed))
    ema = ema_of(model.vae)
    optimizer = Optimizer(
        model, lr=config.lr, warmup_steps=config.warmup_steps, betas=(0.9, 0.95), weight_decay=config.weight_decay, grad_clip=config.grad_clip
    )
    curves = Curves("loss", "l1", "align", "grad_norm")
    first = 0
    if found := context.checkpoints.latest():
        first, state = found
        for part, name in ((model, "model"), (ema, "ema"), (optimizer, "optimizer"), (curves, "curves")):
            part.load_state_dict(state[name])
        context.progress.say(f"resumed after step {first}")

    began, data_seconds = time.monotonic(), 0.0
    for step in range(first, config.steps):
        fetched = time.monotonic()
        batch = _batch(images, step, config, seed)
        data_seconds += time.monotonic() - fetched
        losses = model(batch, config, progress=step / config.steps)
        losses[0].backward()  # type: ignore[no-untyped-call]
        norm = optimizer.step(step)
        update_ema(ema, model.vae, step=step, decay=config.ema_decay)
        curves.add(*(loss.detach() for loss in losses), norm)
        done = step + 1
        if done % LOG_EVERY_STEPS == 0 or done == config.steps:
            point = curves.close(done)
            context.tracker.metrics({f"train/{name}": value for name, value in point.items() if name != "step"}, step=done)
        if done % config.checkpoint_every_steps == 0 and done < config.steps:
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "curves": curves.state_dict()}
            context.checkpoints.save(done, state)
        context.progress.update(done, config.steps, f"loss {curves.last:.4f}")
    train_seconds = time.monotonic() - began

    assert isinstance(ema, ResidualVAE)
    set_statistics(ema, images, seed=seed)
    save_vae(ema, context.output / "vae")
    (context.output / "curves.json").write_text(json.dumps(curves.points, indent=1) + "\n")
    scores = score(ema, held_out if len(held_out) else images[:SCORED_IMAGES])
    _show(ema, held_out if len(held_out) else images, context.output / "reconstructions.png")
    return scores | {
        "steps": config.steps,
        "rows": len(images),
        "parameters": sum(parameter.numel() for parameter in ema.parameters()),
        "train_seconds": round(train_seconds - data_seconds, 3),
        "data_seconds": round(data_seconds + read_seconds, 3),
        "images_per_second": round((config.steps - first) * config.batch_size / max(train_seconds, 1e-9), 1),
    }


class _Trained(nn.Module):
    """The VAE and the linear map from its latent to the teacher's features, which only training needs."""

    def __init__(self, vae: ResidualVAE) -> None:
        super().__init__()
        self.vae = vae
        self.project = nn.Conv2d(vae.config.latent_channels, TEACHER_CHANNELS, 1, bias=False)

    def forward(self, images: Tensor, config: VAE, *, progress: float) -> tuple[Tensor, Tensor, Tensor]:
        """(total loss, L1, alignment) of pictures (B, 3, H, W)."""
        latents = self.vae.encode(images)
        decoded = self.vae.decode(latents)
        l1 = (decoded - images).abs().mean()
        total = config.l1_weight * l1
        if config.mse_weight:
            total = total + config.mse_weight * (decoded - images).square().mean()
        if config.edge_weight:
            total = total + config.edge_weight * edge_loss(decoded, images)
        margin_cos, margin_dist = relaxed(progress, strict=config.align_margins, loose=config.align_margins_relaxed)
        features = gradient_features(images, cell_px=CompressionRatio)
        align = alignment_loss(self.project(latents), features, margin_cos=margin_cos, margin_dist=margin_dist)
        return total + config.align_weight * align, l1, align


def _read_images(context: StepContext, crop_px: int) -> tuple[Tensor, Tensor]:
    """(training pictures, held-out pictures), uint8 (N, 3, crop, crop), scaled to cover the crop."""
    chosen: dict[bool, list[Tensor]] = {False: [], True: []}
    for row in read_kept_rows(context.inputs["kept"], context.inputs):
        picture = fit(decode_image(row.image), (crop_px, crop_px))
        chosen[row.held_out].append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    if not chosen[False]:
        raise UserError("train_vae: the kept rows hold no picture to train on; allowed is at least one that is not held out")
    return torch.stack(chosen[False]), torch.stack(chosen[True]) if chosen[True] else torch.empty(0, 3, crop_px, crop_px, dtype=torch.uint8)


def _initial_vae(config: VAE, seed: int) -> ResidualVAE:
    """The VAE at `vae.path`, or a fresh one keyed by the seed."""
    if config.path is not None:
        vae = load_vae(Path(config.path))
        return vae.train().requires_grad_(True)
    torch.manual_seed(seed)  # modules draw their initial weights from the global generator
    return ResidualVAE(config.model)


def _batch(images: Tensor, step: int, config: VAE, seed: int) -> Tensor:
    """The pictures of optimizer step `step` in [-1, 1], half of them mirrored; a pure function of its arguments."""
    generator = keyed_generator(seed, "vae", step)
    chosen = images[torch.from_numpy(generator.integers(len(images), size=config.batch_size))].float() / 127.5 - 1
    mirrored = torch.from_numpy(generator.random(config.batch_size) < 0.5)
    return torch.where(mirrored[:, None, None, None], chosen.flip(3), chosen)


@torch.inference_mode()
def set_statistics(vae: ResidualVAE, images: Tensor, *, seed: int) -> None:
    """Sets the latents' mean and deviation a channel, over a keyed sample of the training pictures (uint8)."""
    order = keyed_generator(seed, "latent statistics").permutation(len(images))[:STATISTICS_IMAGES]
    batches = torch.from_numpy(np.sort(order)).split(64)
    latents = torch.cat([vae.encode(images[index].float() / 127.5 - 1).flatten(2) for index in batches]).double()
    vae.latent_mean.copy_(latents.mean(dim=(0, 2)))
    vae.latent_std.copy_(latents.std(dim=(0, 2)).clamp_min(1e-4))


@torch.inference_mode()
def score(vae: ResidualVAE, images: Tensor) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of reconstructions of up to SCORED_IMAGES uint8 pictures."""
    pairs = [(image_bytes(vae.decode(vae.encode(part.float() / 127.5 - 1))), part) for part in images[:SCORED_IMAGES].split(64)]
    values = [torch.cat([metric(decoded, part) for decoded, part in pairs]).clamp_max(100.0) for metric in (psnr, ssim)]
    return {"psnr": round(values[0].mean().item(), 4), "ssim": round(values[1].mean().item(), 5)}


@torch.inference_mode()
def _show(vae: ResidualVAE, images: Tensor, path: Path) -> None:
    """Draws originals above their reconstructions, three times as large."""
    shown = images[:SHOWN_IMAGES].float() / 127.5 - 1
    rows = [torch.cat(list(part), dim=2) for part in (shown, vae.decode(vae.encode(shown)))]
    sheet = tensor_image(torch.cat(rows, dim=1))
    sheet.resize((3 * sheet.width, 3 * sheet.height), Image.Resampling.NEAREST).save(path)
