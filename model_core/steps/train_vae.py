"""train_vae: the f16c64 residual autoencoder (R1 3.1, R2): reconstruction and relaxing semantic alignment, no GAN, no KL.

Takes the kept rows and the raw shards; leaves the averaged weights with the latents' statistics in `vae/`, the curves, and
`reconstructions.png`. Rows held out are scored, never trained on. Resumes bitwise from its newest checkpoint: every draw
is keyed by its step, and a checkpoint holds all that a step reads.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from model_core.context import StepContext
from model_core.data.buckets import fit
from model_core.data.keys import keyed_generator
from model_core.data.pixels import image_tensor, tensor_image
from model_core.data.shards import RawRow, decode_image, read_kept_rows
from model_core.documents import UserError
from model_core.evaluation.reconstruction import psnr, ssim
from model_core.models.lpips import LPIPS, load_lpips
from model_core.models.teacher import OrientedEdges
from model_core.models.tiling import RGB, decode_pictures, encode_pictures, opaque
from model_core.models.vae import ResidualVAE, load_vae, save_vae
from model_core.models.vae_diffusers import is_diffusers, read_diffusers
from model_core.objectives.autoencoding import alignment_loss, edge_loss, l1_loss, margins_at, mse_loss, pair_places, value_at
from model_core.recipe import VAE
from model_core.training.checkpoint import Stateful
from model_core.training.curves import Curves
from model_core.training.distributed import compute_device, keep_deterministic, sum_gradients, sum_over_ranks
from model_core.training.ema import ema_of, update_ema
from model_core.training.optim import Optimizer
from model_core.training.stopping import Stopped, noting_sigterm

if TYPE_CHECKING:
    from model_core.models.dinov2 import DINOv2Layer

BETAS = (0.9, 0.99)
STATISTICS_IMAGES = 1024
SCORED_IMAGES = 512
SHOWN_IMAGES = 8
EVAL_BATCH = 64


def run(context: StepContext) -> dict[str, Any]:
    """Trains to the end; returns held-out scores, counts and times."""
    config, seed, ranks = context.recipe.vae, context.recipe.seed, context.ranks
    device = compute_device(ranks)
    keep_deterministic(device)
    teacher = _teacher(config).to(device)
    lpips = None if config.lpips_path is None else load_lpips(Path(config.lpips_path).expanduser()).to(device)
    torch.manual_seed(seed)  # modules draw their initial weights from the global generator
    model = AlignedVAE(_initial_vae(config), teacher_dim=teacher.dim).to(device)
    began = time.monotonic()
    pictures, held_out = _read_pictures(context)
    data_seconds = time.monotonic() - began

    ema = ema_of(model.vae)
    optimizer = Optimizer(
        model, lr=config.lr, warmup_steps=config.warmup_steps, betas=BETAS, weight_decay=config.weight_decay, grad_clip=config.grad_clip
    )
    names = ("l1", "mse", "edge", "align", *(["lpips"] if lpips else []))
    curves = Curves("loss", *names, "grad_norm")
    stateful: dict[str, Stateful] = {"model": model, "ema": ema, "optimizer": optimizer, "curves": curves}
    restored = context.checkpoints.restore(stateful)
    first = 0 if restored is None else restored.step
    share = ranks.share(config.batch_size)
    ahead = batches(pictures, share, first=first, config=config, seed=seed, workers=context.loader_workers)

    began, batch_seconds = time.monotonic(), 0.0
    with noting_sigterm() as stop:
        for step in range(first, config.steps):
            fetched = time.monotonic()
            images = next(ahead).to(device)
            batch_seconds += time.monotonic() - fetched
            parts = torch.zeros(1 + len(names), device=device)
            if len(share):  # every part of the loss is a mean over equal pictures, so ranks weigh by theirs
                loss, terms = losses(model, teacher, images, config=config, step=step, seed=seed, lpips=lpips)
                weight = len(share) / config.batch_size
                (loss * weight).backward()
                parts = torch.stack([loss.detach(), *terms]) * weight
            sum_gradients(model.parameters(), ranks)
            norm = optimizer.clip()
            optimizer.step(step)
            update_ema(ema, model.vae, step=step, decay=config.ema_decay)
            curves.add(*sum_over_ranks(parts, ranks).cpu(), norm.cpu())
            done = step + 1
            if done % config.log_every_steps == 0 or done == config.steps:
                point = curves.close(done)
                context.log({f"train/{name}": value for name, value in point.items() if name != "step"}, step=done)
            stopped = done < config.steps and stop.agreed(ranks)
            if stopped or (done % config.checkpoint_every_steps == 0 and done < config.steps):
                context.checkpoints.save(done, stateful, notes={"recipe": context.recipe.digest()})
            if stopped:
                context.checkpoints.wait()
                raise Stopped(f"told to stop after step {done}, which is saved; the same command goes on from there")
            context.show(done, config.steps, f"loss {curves.last:.4f}" if curves.points else "")
    seconds = time.monotonic() - began
    if not ranks.is_first:
        return {}

    assert isinstance(ema, ResidualVAE)
    return _publish(context, ema=ema, pictures=pictures, held_out=held_out, curves=curves, lpips=lpips) | {
        "steps": config.steps,
        "ranks": ranks.size,
        "pictures": len(pictures),
        "parameters": sum(parameter.numel() for parameter in ema.parameters()),
        "train_seconds": round(seconds - batch_seconds, 3),
        "data_seconds": round(data_seconds + batch_seconds, 3),
        "images_per_second": round((config.steps - first) * config.batch_size / max(seconds, 1e-9), 1),
    }


class AlignedVAE(nn.Module):
    """The VAE and the linear map from its latent to the teacher's features, which training alone needs (R2 4.2)."""

    def __init__(self, vae: ResidualVAE, *, teacher_dim: int) -> None:
        super().__init__()
        self.vae = vae
        self.project = nn.Conv2d(vae.config.latent_channels, teacher_dim, 1, bias=False)


def losses(
    model: AlignedVAE, teacher: nn.Module, images: Tensor, *, config: VAE, step: int, seed: int, lpips: LPIPS | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The weighted loss of pictures (B, 3, H, W) at a step, and its detached parts: L1, MSE, edges, alignment, and LPIPS if given."""
    pixels = opaque(images, channels=model.vae.config.pixel_channels)
    latents = model.vae.encode(pixels)
    decoded = model.vae.decode(latents)
    margins = margins_at(step, steps=config.steps, strict=config.align_margins, relaxed=config.align_margins_relaxed)
    places = pair_places(latents.shape[2] * latents.shape[3], seed, "alignment", step)
    parts = [
        l1_loss(decoded, pixels),
        mse_loss(decoded, pixels),
        edge_loss(decoded, pixels),
        alignment_loss(model.project(latents), teacher(images), margins=margins, places=places),
    ]
    at_end = config.align_weight if config.align_weight_relaxed is None else config.align_weight_relaxed
    align_weight = value_at(step, steps=config.steps, strict=config.align_weight, relaxed=at_end)
    weights = [config.l1_weight, config.mse_weight, config.edge_weight, align_weight]
    if lpips is not None:
        parts.append(lpips(decoded[:, :RGB], images).mean())
        weights.append(config.lpips_weight)
    loss = torch.stack([weight * part for weight, part in zip(weights, parts, strict=True) if weight]).sum()
    return loss, tuple(part.detach() for part in parts)


def batches(pictures: Sequence[bytes], slots: range, *, first: int, config: VAE, seed: int, workers: int) -> Iterator[Tensor]:
    """The batches from step `first` to the last, each made ahead by one of so many threads; without any, when it is asked for."""
    make = partial(batch, pictures, slots, config=config, seed=seed)
    if workers == 0:
        yield from (make(step=step) for step in range(first, config.steps))
        return
    with ThreadPoolExecutor(workers, "crops") as pool:
        ahead = deque(pool.submit(make, step=step) for step in range(first, min(first + workers, config.steps)))
        for step in range(first + workers, config.steps + workers):
            done = ahead.popleft().result()
            if step < config.steps:
                ahead.append(pool.submit(make, step=step))
            yield done


def batch(pictures: Sequence[bytes], slots: range, *, step: int, config: VAE, seed: int) -> Tensor:
    """Crops (len(slots), 3, crop, crop) for these slots of optimizer step `step`'s batch: pictures and places keyed by slot."""
    crops = []
    for slot in slots:
        generator = keyed_generator(seed, "vae", step, slot)
        picture = pictures[int(generator.integers(len(pictures)))]
        crops.append(image_tensor(_crop(decode_image(picture), config.crop_px, generator)))
    return torch.stack(crops) if crops else torch.zeros(0, 3, config.crop_px, config.crop_px)


def _crop(image: Image.Image, side_px: int, generator: np.random.Generator) -> Image.Image:
    """A square at a drawn scale and place; a picture smaller than the square is scaled to cover it.

    Scales are log-uniform between that at which the square spans the shorter side, as encode_latents scales pictures, and 1.
    """
    shorter = min(image.size)
    scale = (side_px / shorter) ** (generator.random() if shorter > side_px else 1.0)
    if shorter != side_px:
        image = fit(image, (max(side_px, round(image.height * scale)), max(side_px, round(image.width * scale))))
    left, top = (int(generator.integers(side - side_px + 1)) for side in image.size)
    return image.crop((left, top, left + side_px, top + side_px))


def _read_pictures(context: StepContext) -> tuple[list[bytes], list[RawRow]]:
    """(encoded pictures to train on, held-out rows). An edit gives its target and its references: the transformer meets both."""
    pictures: list[bytes] = []
    held_out = []
    for row in read_kept_rows(context.inputs["kept"], context.inputs):
        if row.held_out:
            held_out.append(row)
        else:
            pictures += [row.image, *row.references]
    if not pictures:
        raise UserError("train_vae: found no picture to train on among the kept rows; allowed is at least one that is not held out")
    return pictures, held_out


def _teacher(config: VAE) -> OrientedEdges | DINOv2Layer:
    """DINOv2 where the recipe names it; raises UserError where that is none."""
    if config.teacher_path is None or config.teacher_layer is None:
        return OrientedEdges()
    from model_core.models.dinov2 import load_dinov2  # transformers costs a second that few runs need

    return load_dinov2(Path(config.teacher_path).expanduser(), layer=config.teacher_layer)


def _initial_vae(config: VAE) -> ResidualVAE:
    """The VAE at `vae.path`, in this project's files or diffusers', or a fresh one."""
    if config.path is None:
        return ResidualVAE(config.model)
    folder = Path(config.path).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(f"vae.path: {folder} holds no config.json; allowed is a folder of a VAE's weights, this project's or diffusers'")
    return (read_diffusers(folder) if is_diffusers(folder) else load_vae(folder)).train()


def _publish(
    context: StepContext, *, ema: ResidualVAE, pictures: list[bytes], held_out: list[RawRow], curves: Curves, lpips: LPIPS | None
) -> dict[str, Any]:
    """Sets the latents' statistics, if anything was trained, and writes weights, curves and the sheet; returns the scores."""
    config, seed = context.recipe.vae, context.recipe.seed
    if config.steps:  # what was not trained keeps them: a transformer that came with it knows latents in their scale
        order = keyed_generator(seed, "vae", "statistics").permutation(len(pictures))[:STATISTICS_IMAGES]
        set_statistics(ema, _squares([pictures[index] for index in order], config.crop_px))
    save_vae(ema, context.output / "vae")
    (context.output / "curves.json").write_text(json.dumps(curves.points, indent=1) + "\n")
    # A handful of pictures may have none held out; then the scores say on what they were taken.
    scored = [(row.kind, row.image) for row in held_out] or [("trained", picture) for picture in pictures]
    scored = [scored[index] for index in keyed_generator(seed, "vae", "scores").permutation(len(scored))[:SCORED_IMAGES]]
    images = _squares([picture for _, picture in scored], config.crop_px)
    scores = score(ema, images, [kind for kind, _ in scored], lpips=lpips)
    show(ema, images[:SHOWN_IMAGES], context.output / "reconstructions.png")
    context.log({f"val/{name}": value for name, value in scores.items()}, step=config.steps)
    context.tracker.image("reconstructions", context.output / "reconstructions.png", config.steps)
    return scores | {"scored_pictures": len(scored), "scored_on": "held out" if held_out else "trained"}


def _squares(pictures: Sequence[bytes], side_px: int) -> Tensor:
    """(N, 3, side, side), each scaled to cover the square and cropped at its centre."""
    return torch.stack([image_tensor(fit(decode_image(picture), (side_px, side_px))) for picture in pictures])


@torch.inference_mode()
def set_statistics(vae: ResidualVAE, images: Tensor) -> None:
    """Sets the latents' mean and deviation a channel to those of the pictures' latents."""
    device = vae.latent_mean.device
    latents = torch.cat([encode_pictures(vae, part.to(device)).flatten(2) for part in images.split(EVAL_BATCH)]).double()
    vae.latent_mean.copy_(latents.mean(dim=(0, 2)))
    # A channel that never changes carries nothing; its deviation stays above zero so that it can be divided by.
    vae.latent_std.copy_(latents.std(dim=(0, 2), correction=0).clamp_min(1e-4))


@torch.inference_mode()
def score(vae: ResidualVAE, images: Tensor, kinds: Sequence[str], *, lpips: LPIPS | None = None) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of the reconstructions, and LPIPS on VGG16 if given; PSNR also a kind."""
    originals = images.to(vae.latent_mean.device).split(EVAL_BATCH)
    pairs = [(decode_pictures(vae, encode_pictures(vae, part)), part) for part in originals]
    decibels, similarity = (torch.cat([metric(*pair) for pair in pairs]).cpu() for metric in (psnr, ssim))
    result = {"psnr": round(decibels.mean().item(), 4), "ssim": round(similarity.mean().item(), 5)}
    if lpips is not None:
        distances = torch.cat([lpips(decoded.clamp(-1, 1), original) for decoded, original in pairs])
        result["lpips_vgg16"] = round(distances.mean().item(), 5)
    for kind in sorted(set(kinds)):
        chosen = torch.tensor([other == kind for other in kinds])
        result[f"psnr_{kind}"] = round(decibels[chosen].mean().item(), 4)
    return result


@torch.inference_mode()
def show(vae: ResidualVAE, images: Tensor, path: Path) -> None:
    """Draws pictures above their reconstructions, three times as large."""
    decoded = decode_pictures(vae, encode_pictures(vae, images.to(vae.latent_mean.device))).cpu()
    sheet = tensor_image(torch.cat([torch.cat(list(row), dim=2) for row in (images, decoded)], dim=1))
    sheet.resize((3 * sheet.width, 3 * sheet.height), Image.Resampling.NEAREST).save(path)
