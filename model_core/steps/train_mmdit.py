"""train_mmdit: one stage of the curriculum (R1 section 3 and Table 2), text-to-image and editing in one stream.

Takes the stage's latents, the frozen condition encoder and, after the first stage, the stage before; leaves the EMA weights
in `mmdit/`, this stage's curves, `history.json` with those of all stages so far, and `ledger.json`, the proof of which samples it
used. Resumes from its newest checkpoint on any number of ranks: every draw is keyed, so no generator has a state to save.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model_core.context import StepContext
from model_core.data.index import Index
from model_core.data.latents import HELD_OUT, LatentGroup, Origin, latent_group, latent_rows, open_latents
from model_core.data.loader import Draws, Loader, MicroBatch
from model_core.data.plan import Plan, make_plan
from model_core.data.row_groups import RowGroups
from model_core.models.condition import ConditionEncoder, load_encoder
from model_core.models.mmdit import MMDiT, load_mmdit, save_mmdit
from model_core.objectives.flow import flow_loss, interpolate, velocity_target
from model_core.training.checkpoint import CheckpointStore, Stateful
from model_core.training.curves import Curves
from model_core.training.distributed import sum_gradients, sum_over_ranks
from model_core.training.ema import ema_of, update_ema
from model_core.training.ledger import FILE_NAME as LEDGER
from model_core.training.ledger import Ledger, LedgerError, check_ledger, ledger_document, plan_document
from model_core.training.optim import Optimizer
from model_core.training.stopping import Stopped, noting_sigterm
from model_core.training.validation import validation_loss


def run(context: StepContext) -> dict[str, Any]:
    """Trains the stage to its end; returns losses, counts and times. Of several ranks the first alone publishes."""
    assert context.stage is not None
    recipe, stage, ranks = context.recipe.mmdit, context.recipe.mmdit.stages[context.stage], context.ranks
    torch.use_deterministic_algorithms(True)
    encoder = load_encoder(context.inputs["encoder"].folder("encoder"))
    index, origin, channels = open_latents(context.inputs["latents"], origin=expected_origin(context))
    groups = open_groups(context, index)
    plan = stage_plan(context, index)
    draws = Draws(
        recipe.logit_normal,
        recipe.uncond_dropout,
        {str(name): weight for name, weight in recipe.caption_weights.items()},
        recipe.shift_mu,
        encoder.num_tokens(""),
    )
    model = _initial_model(context, latent_channels=channels, text_dim=encoder.dim)
    loader = Loader(groups, plan, draws, model.config, recipe.micro_batch_tokens, ranks, workers=context.loader_workers)
    ema = ema_of(model)
    optimizer = Optimizer(
        model,
        lr=stage.lr,
        warmup_steps=stage.warmup_steps,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        grad_clip=recipe.grad_clip,
    )
    curves, ledger = Curves("loss", "grad_norm"), Ledger()
    stateful: dict[str, Stateful] = {"model": model, "ema": ema, "optimizer": optimizer, "curves": curves}
    first = resume(context.checkpoints, stateful, ledger)

    def save(step: int) -> None:
        ledger.join(ranks)
        notes = {"ledger": ledger.state_dict(), "plan": plan_document(plan), "recipe": context.recipe.digest()}
        context.checkpoints.save(step, stateful, notes=notes)

    began = time.monotonic()
    with noting_sigterm() as stop:
        for step, batch in enumerate(loader.stream(first, stage.steps), first):
            num_elements = int(sum_over_ranks(torch.tensor(batch.num_elements), ranks))
            loss = sum_over_ranks(backward(model, encoder, batch.micro_batches, num_elements=num_elements), ranks)
            sum_gradients(model.parameters(), ranks)
            norm = optimizer.step(step)
            update_ema(ema, model, step=step, decay=recipe.ema_decay)
            ledger.add(batch.ids, batch.missing)
            curves.add(loss, norm)
            done = step + 1
            if done % recipe.log_every_steps == 0 or done == stage.steps:
                point = curves.close(done)
                waited = loader.waited_seconds / (time.monotonic() - began)
                context.log({"train/loss": point["loss"], "train/grad_norm": point["grad_norm"], "data/wait_share": waited}, step=done)
            stopped = done < stage.steps and stop.agreed(ranks)
            if stopped or (done % recipe.checkpoint_every_steps == 0 and done < stage.steps):
                save(done)
            if stopped:
                context.checkpoints.wait()
                raise Stopped(f"told to stop after step {done}, which is saved; the same command goes on from there")
            context.show(done, stage.steps, f"loss {curves.last:.4f}" if curves.points else "")
    seconds = time.monotonic() - began

    ledger.join(ranks)
    if not ranks.is_first:
        return {}
    return _publish(context, ema=ema, encoder=encoder, groups=groups, curves=curves, ledger=ledger, plan=plan) | {
        "steps": stage.steps,
        "samples": sum(step.count for step in ledger.steps),
        "trained_rows": sum(rows.total for rows in plan.rows.values()),
        "missing_samples": ledger.num_missing,
        "warnings": missing_warnings(ledger, index),
        "vae": origin.vae,
        "ranks": ranks.size,
        "train_seconds": round(seconds - loader.waited_seconds, 3),
        "data_seconds": round(loader.waited_seconds, 3),
        "data_wait_share": round(loader.waited_seconds / max(seconds, 1e-9), 5),
        "samples_per_second": round((stage.steps - first) * stage.batch_size / max(seconds, 1e-9), 1),
    }


def expected_origin(context: StepContext) -> Origin:
    """What the latents must have been made with: the condition encoder at hand and, after the first stage, that stage's VAE."""
    previous = context.inputs.get("previous")
    vae = None if previous is None else previous.manifest.stats.get("vae")
    return Origin(vae=vae, encoder=context.inputs["encoder"].manifest.content_digest)


def missing_warnings(ledger: Ledger, index: Index) -> list[str]:
    """What a reader of the report must know of samples that were left out."""
    damaged = sorted({group for groups in ledger.missing.values() for group in groups})
    if not damaged:
        return []
    named = ", ".join(str(index[number]) for number in damaged[:3]) + (" and others" if len(damaged) > 3 else "")
    return [f"{ledger.num_missing} samples were left out, as their row groups are missing or damaged: {named}"]


def stage_plan(context: StepContext, index: Index) -> Plan:
    """The order of the stage's samples."""
    assert context.stage is not None
    stage = context.recipe.mmdit.stages[context.stage]
    shares = {"edit": stage.edit_share, "text_image": stage.text_image_share, "image": 1.0 - stage.edit_share - stage.text_image_share}
    return make_plan(
        digest=index.digest,
        seed=context.recipe.seed,
        stage=context.stage,
        rows=latent_rows(index, kinds=stage.kinds),
        shares={kind: share for kind, share in shares.items() if kind in stage.kinds},
        batch_size=stage.batch_size,
        window=context.recipe.mmdit.window_row_groups,
    )


def open_groups(context: StepContext, index: Index) -> RowGroups[LatentGroup]:
    """The stage's row groups; memory holds two windows a kind, the one in use and the next."""
    assert context.stage is not None
    window, kinds = context.recipe.mmdit.window_row_groups, context.recipe.mmdit.stages[context.stage].kinds
    return RowGroups(context.inputs["latents"], index, latent_group, capacity=2 * (window + 1) * len(kinds), say=context.progress.say)


def resume(checkpoints: CheckpointStore, parts: Mapping[str, Stateful], ledger: Ledger) -> int:
    """Takes up the newest checkpoint; returns its step, which is 0 when there is none."""
    found = checkpoints.restore(parts)
    if found is None:
        return 0
    ledger.load_state_dict(found.notes["ledger"])
    return found.step


def backward(model: nn.Module, encoder: ConditionEncoder, batch: Sequence[MicroBatch], *, num_elements: int) -> Tensor:
    """Adds the gradients of these passes' share of the mean flow-matching loss over `num_elements`; returns it, detached."""
    total = torch.zeros(())
    for micro in batch:
        text, mask = encoder.encode(micro.prompts)
        x0 = micro.pictures[micro.is_target]
        t = micro.t[micro.stream.sample[micro.stream.is_target]]
        noisy = micro.pictures.masked_scatter(micro.is_target[:, None], interpolate(x0, micro.noise, t))
        velocity = model(noisy, text[mask], micro.t, micro.stream)
        loss = flow_loss(velocity, velocity_target(x0, micro.noise), num_elements=num_elements)
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
    context: StepContext,
    *,
    ema: nn.Module,
    encoder: ConditionEncoder,
    groups: RowGroups[LatentGroup],
    curves: Curves,
    ledger: Ledger,
    plan: Plan,
) -> dict[str, Any]:
    """Writes weights, curves and the ledger; returns the stage's losses. Raises LedgerError when the ledger does not add up."""
    assert isinstance(ema, MMDiT)
    assert context.stage is not None
    recipe, stage = context.recipe, context.recipe.mmdit.stages[context.stage]
    if problems := check_ledger(ledger, plan, groups):
        raise LedgerError("; ".join(problems))
    save_mmdit(ema, context.output / "mmdit")
    losses = validation_loss(ema, encoder, groups, latent_rows(groups.index, kinds=stage.kinds, split=HELD_OUT), seed=recipe.seed)
    context.log({f"val/loss/{kind}": loss for kind, loss in losses.items()}, step=stage.steps)
    history = context.inputs["previous"].read_json("history.json") if "previous" in context.inputs else []
    history.append({"stage": context.stage, "curves": curves.points, "validation": losses})
    for name, document in (("curves.json", curves.points), ("history.json", history), (LEDGER, ledger_document(ledger, plan))):
        (context.output / name).write_text(json.dumps(document, indent=1) + "\n")
    return {"loss": curves.last, **{f"val_loss_{kind}": loss for kind, loss in losses.items()}}
