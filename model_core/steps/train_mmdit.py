"""train_mmdit: one stage of the curriculum (R1 section 3 and Table 2), text-to-image and editing in one stream.

Takes the stage's latents, the frozen condition encoder and, after the first stage, the stage before; leaves the EMA weights
in `mmdit/`, this stage's curves, and `history.json` with those of all stages so far. Resumes bitwise from its newest
checkpoint: every draw is keyed, and a checkpoint holds all that a step reads.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model_core.context import StepContext
from model_core.data.latents import LatentShard, read_latents
from model_core.data.loader import Draws, LatentRows, Loader, MicroBatch
from model_core.data.plan import make_plan
from model_core.models.condition import ConditionEncoder, load_encoder
from model_core.models.mmdit import MMDiT, load_mmdit, save_mmdit
from model_core.objectives.flow import flow_loss, interpolate, velocity_target
from model_core.training.checkpoint import Stateful
from model_core.training.curves import Curves
from model_core.training.ema import ema_of, update_ema
from model_core.training.optim import Optimizer
from model_core.training.validation import validation_loss

LOG_EVERY_STEPS = 20


def run(context: StepContext) -> dict[str, Any]:
    """Trains the stage to its end; returns losses, counts and times."""
    assert context.stage is not None
    recipe, stage = context.recipe.mmdit, context.recipe.mmdit.stages[context.stage]
    shards = [read_latents(context.inputs["latents"].path(name)) for name in context.inputs["latents"].names("latents/")]
    rows = LatentRows(shards, stage.kinds)
    shares = {"edit": stage.edit_share, "text_image": stage.text_image_share, "image": 1.0 - stage.edit_share - stage.text_image_share}
    shares = {kind: share for kind, share in shares.items() if kind in stage.kinds}
    plan = make_plan(seed=context.recipe.seed, stage=context.stage, sizes=rows.sizes, shares=shares, batch_size=stage.batch_size)
    draws = Draws(recipe.logit_normal, recipe.uncond_dropout, {str(name): weight for name, weight in recipe.caption_weights.items()})
    loader = Loader(rows, plan, draws)

    torch.use_deterministic_algorithms(True)
    encoder = load_encoder(context.inputs["encoder"].folder("encoder"))
    model = _initial_model(context, latent_channels=shards[0].latents.shape[1], text_dim=encoder.dim)
    ema = ema_of(model)
    optimizer = Optimizer(
        model,
        lr=stage.lr,
        warmup_steps=stage.warmup_steps,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        grad_clip=recipe.grad_clip,
    )
    curves = Curves("loss", "grad_norm")
    stateful: dict[str, Stateful] = {"model": model, "ema": ema, "optimizer": optimizer, "curves": curves}
    restored = context.checkpoints.restore(stateful)
    first = restored.step if restored else 0

    began, data_seconds = time.monotonic(), 0.0
    for step in range(first, stage.steps):
        fetched = time.monotonic()
        batch = loader.batch(step)
        data_seconds += time.monotonic() - fetched
        loss = backward(model, encoder, batch, batch_size=stage.batch_size)
        norm = optimizer.step(step)
        update_ema(ema, model, step=step, decay=recipe.ema_decay)
        curves.add(loss, norm)
        done = step + 1
        if done % LOG_EVERY_STEPS == 0 or done == stage.steps:
            point = curves.close(done)
            context.tracker.metrics({"train/loss": point["loss"], "train/grad_norm": point["grad_norm"]}, step=done)
        if done % recipe.checkpoint_every_steps == 0 and done < stage.steps:
            context.checkpoints.save(done, stateful, notes={})
        context.progress.update(done, stage.steps, f"loss {curves.last:.4f}" if curves.points else "")
    seconds = time.monotonic() - began

    return _publish(context, ema=ema, encoder=encoder, shards=shards, curves=curves) | {
        "steps": stage.steps,
        "samples": stage.steps * stage.batch_size,
        "trained_rows": sum(rows.sizes.values()),
        "train_seconds": round(seconds - data_seconds, 3),
        "data_seconds": round(data_seconds, 3),
        "samples_per_second": round((stage.steps - first) * stage.batch_size / max(seconds, 1e-9), 1),
    }


def backward(model: nn.Module, encoder: ConditionEncoder, batch: list[MicroBatch], *, batch_size: int) -> Tensor:
    """Adds the gradients of the batch's mean flow-matching loss; returns that loss, detached."""
    total = torch.zeros(())
    for micro in batch:
        text, mask = encoder.encode(micro.prompts)
        noisy = interpolate(micro.latents, micro.noise, micro.t)
        velocity = model(noisy, micro.t, text, mask, micro.shape, references=[(reference, micro.shape) for reference in micro.references])
        loss = flow_loss(velocity, velocity_target(micro.latents, micro.noise)).sum() / batch_size
        loss.backward()
        total += loss.detach()
    return total


def _initial_model(context: StepContext, *, latent_channels: int, text_dim: int) -> MMDiT:
    """The stage before's weights; for the first stage those at `mmdit.path`, or fresh ones keyed by the seed."""
    if "previous" in context.inputs:
        return load_mmdit(context.inputs["previous"].folder("mmdit"))
    if context.recipe.mmdit.path is not None:
        return load_mmdit(Path(context.recipe.mmdit.path))
    torch.manual_seed(context.recipe.seed)  # modules draw their initial weights from the global generator
    return MMDiT(context.recipe.mmdit.model, latent_channels=latent_channels, text_dim=text_dim)


def _publish(
    context: StepContext, *, ema: nn.Module, encoder: ConditionEncoder, shards: list[LatentShard], curves: Curves
) -> dict[str, Any]:
    """Writes weights and curves; returns the stage's losses."""
    assert isinstance(ema, MMDiT)
    recipe = context.recipe
    save_mmdit(ema, context.output / "mmdit")
    assert context.stage is not None
    held_out = LatentRows(shards, recipe.mmdit.stages[context.stage].kinds, held_out=True)
    losses = validation_loss(ema, encoder, held_out, seed=recipe.seed)
    context.tracker.metrics({f"val/loss/{kind}": loss for kind, loss in losses.items()}, step=recipe.mmdit.stages[context.stage].steps)
    history = context.inputs["previous"].read_json("history.json") if "previous" in context.inputs else []
    history.append({"stage": context.stage, "curves": curves.points, "validation": losses})
    for name, document in (("curves.json", curves.points), ("history.json", history)):
        (context.output / name).write_text(json.dumps(document, indent=1) + "\n")
    return {"loss": curves.last, **{f"val_loss_{kind}": loss for kind, loss in losses.items()}}
