"""train_mmdit: one stage of the curriculum (R1 section 3 and Table 2), text-to-image and editing in one stream.

Takes the stage's latents, the frozen condition encoder and, after the first stage, the stage before; leaves the EMA weights
in `mmdit/`, this stage's curves, `history.json` with those of all stages so far, and `ledger.json`, the proof of which samples it
used. Resumes from its newest checkpoint on any number of ranks: every draw is keyed, so no generator has a state to save.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from typing import Any

import torch

from model_core.context import StepContext
from model_core.data.conditions import Condition
from model_core.data.folders import Folder
from model_core.data.index import Index
from model_core.data.latents import HELD_OUT, LatentGroup, Origin, latent_group, latent_rows, open_latents, states_by_kind
from model_core.data.loader import Draws, Loader
from model_core.data.plan import Plan, make_plan
from model_core.data.row_groups import RowGroups
from model_core.data.states import read_empty
from model_core.documents import UserError
from model_core.models.condition import ConditionEncoder, load_encoder, sees_images
from model_core.models.earlier_mmdit import load_earlier
from model_core.models.mmdit import MMDiT, load_mmdit, save_mmdit
from model_core.training.activation_statistics import activation_statistics
from model_core.training.checkpoint import CheckpointStore, Stateful
from model_core.training.curves import Curves
from model_core.training.distributed import compute_device, frozen_dtype, keep_deterministic, whole
from model_core.training.ema import ema_of, update_ema
from model_core.training.float8 import check_float8
from model_core.training.guard import StepGuard, TrainingDiverged
from model_core.training.ledger import FILE_NAME as LEDGER
from model_core.training.ledger import Ledger, LedgerError, check_ledger, ledger_document, plan_document
from model_core.training.meter import Meter, peak_flops_of_this_gpu
from model_core.training.optim import Optimizer
from model_core.training.parallel import check_layout, lay_out, prepare, shard
from model_core.training.passes import Passes
from model_core.training.stopping import Stopped, noting_sigterm
from model_core.training.validation import validation_loss


def run(context: StepContext) -> dict[str, Any]:
    """Trains the stage to its end; returns losses, counts and times. Of several ranks the first alone publishes."""
    assert context.stage is not None
    recipe, stage, ranks = context.recipe.mmdit, context.recipe.mmdit.stages[context.stage], context.ranks
    device = compute_device(ranks)
    if recipe.precision != "fp32" and device.type == "cpu":
        found = f"found {recipe.precision} on a machine without a GPU, where it is hundreds of times slower"
        raise UserError(f"mmdit.precision: {found}; allowed is fp32")
    keep_deterministic(device)
    stored = states_by_kind(stage.kinds, cache_states=stage.cache_states, sees_images=sees_images(context.inputs["encoder"]))
    index, origin, channels = open_latents(context.inputs["latents"], origin=expected_origin(context), states=stored)
    # A large model, which takes minutes to load and memory from training, is not needed where all states are stored.
    encoder = None
    if set(stored) != set(stage.kinds):
        encoder = load_encoder(context.inputs["encoder"].folder("encoder"), dtype=frozen_dtype(device)).to(device)
    empty, text_dim = without_prompt(context.inputs["latents"] if stored else None, encoder)
    groups = open_groups(context, index)
    plan = stage_plan(context, index)
    draws = Draws(
        recipe.logit_normal,
        recipe.uncond_dropout,
        {str(name): weight for name, weight in recipe.caption_weights.items()},
        recipe.shift_mu,
        empty,
    )
    profile = context.site.launch.profile("train_mmdit")
    model = _initial_model(context, latent_channels=channels, text_dim=text_dim).to(device)
    check_layout(model.config, profile, ranks)
    layout = lay_out(ranks, context_parallel=profile.context_parallel)
    if recipe.precision == "float8":
        check_float8(model, device)
    loader = Loader(groups, plan, draws, model.config, recipe.micro_batch_tokens, layout.data, workers=context.loader_workers)
    ema = ema_of(model)
    dtype = torch.float32 if recipe.precision == "fp32" else torch.bfloat16
    prepare(model, profile, ranks, dtype=dtype, float8=recipe.precision == "float8")
    shard(ema, profile, ranks, dtype=dtype)
    optimizer = Optimizer(
        model,
        lr=stage.lr,
        warmup_steps=stage.warmup_steps,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        grad_clip=recipe.grad_clip,
    )
    passes = Passes(encoder, layout, bfloat16=recipe.precision != "fp32")
    curves, ledger, guard = Curves("loss", "grad_norm"), Ledger(), StepGuard(recipe.guard)
    stateful: dict[str, Stateful] = {"model": model, "ema": ema, "optimizer": optimizer, "curves": curves}
    meter = Meter(ranks.size, peak_flops_of_this_gpu(), began_at=time.time())
    first = resume(context.checkpoints, stateful, ledger, guard, meter)

    def save(step: int) -> None:
        ledger.join(ranks)
        told = {"ledger": ledger.state_dict(), "guard": guard.state_dict(), "meter": meter.state_dict()}
        context.checkpoints.save(step, stateful, notes=told | {"plan": plan_document(plan), "recipe": context.recipe.digest()})

    began = time.monotonic()
    with noting_sigterm() as stop:
        for step, batch in enumerate(loader.stream(first, stage.steps), first):
            done, step_began = step + 1, time.monotonic()
            logged = done % recipe.log_every_steps == 0 or done == stage.steps
            with activation_statistics(model, active=logged) as activations:
                result = passes.backward(model, batch)
            norm = optimizer.clip()
            verdict = guard.judge(done, loss=result.loss.item(), grad_norm=norm.item())
            if verdict == "good":
                optimizer.step(step)
                update_ema(ema, model, step=step, decay=recipe.ema_decay)
                curves.add(result.loss.cpu(), norm.cpu())
            else:
                optimizer.clear()
                context.say(guard.newest)
            meter.add(time.monotonic() - step_began, tokens=result.num_tokens, flops=result.flops, good=verdict == "good")
            ledger.add(batch.ids if layout.context.is_first else {}, batch.missing if layout.context.is_first else {})
            if verdict == "roll back":
                roll_back(context.checkpoints, stateful, curves, guard)
            if logged:
                context.log(meter.close() | {f"activations/{name}": value.item() for name, value in activations.items()}, step=done)
            if logged and curves.count:
                point = curves.close(done)
                waited = loader.waited_seconds / (time.monotonic() - began)
                context.log({"train/loss": point["loss"], "train/grad_norm": point["grad_norm"], "data/wait_share": waited}, step=done)
            stopped = done < stage.steps and stop.agreed(ranks)
            due = stopped or done % recipe.checkpoint_every_steps == 0 or verdict == "roll back"
            if due and guard.calm and done < stage.steps:
                save(done)
            if stopped:
                context.checkpoints.wait()
                saved = "which is saved" if guard.calm else "among bad ones, which is not saved"
                raise Stopped(f"told to stop after step {done}, {saved}; the same command goes on from the newest checkpoint")
            context.show(done, stage.steps, f"loss {curves.last:.4f}" if curves.points else "")
    seconds = time.monotonic() - began

    ledger.join(ranks)
    weights = {name: whole(value).cpu() for name, value in ema.state_dict().items()}
    if not ranks.is_first:
        return {}
    published = MMDiT(model.config, latent_channels=channels, text_dim=text_dim)
    published.load_state_dict(weights)
    return _publish(context, published.to(device), encoder=encoder, empty=empty, groups=groups, curves=curves, ledger=ledger, plan=plan) | {
        "steps": stage.steps,
        "samples": sum(step.count for step in ledger.steps),
        "trained_rows": sum(rows.total for rows in plan.rows.values()),
        "missing_samples": ledger.num_missing,
        "skipped_steps": len(guard.events),
        "rollbacks": guard.num_rollbacks,
        "warnings": [*missing_warnings(ledger, index), *guard.warnings],
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


def without_prompt(latents: Folder | None, encoder: ConditionEncoder | None) -> tuple[Condition, int]:
    """What a sample without a prompt is conditioned on, and the channels of text states.

    From `latents` where they hold text states (None: they hold none), and else from the encoder.
    """
    if latents is not None:
        empty = read_empty(latents)
        return Condition("", empty.runs, empty.states), empty.states.shape[1]
    assert encoder is not None, "text states are stored or computed"
    return Condition("", (encoder.num_tokens(""),)), encoder.dim


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


def resume(checkpoints: CheckpointStore, parts: Mapping[str, Stateful], ledger: Ledger, guard: StepGuard, meter: Meter) -> int:
    """Takes up the newest checkpoint; returns its step, which is 0 when there is none."""
    found = checkpoints.restore(parts)
    if found is None:
        return 0
    ledger.load_state_dict(found.notes["ledger"])
    guard.load_state_dict(found.notes["guard"])
    meter.load_state_dict(found.notes["meter"])
    return found.step


def roll_back(checkpoints: CheckpointStore, parts: Mapping[str, Stateful], curves: Curves, guard: StepGuard) -> None:
    """Gives weights, averages and moments back what the newest checkpoint holds; curves, ledger and data go on."""
    drawn = copy.deepcopy(curves.state_dict())  # restoring writes into the tensors that are there
    if checkpoints.restore(parts) is None:
        raise TrainingDiverged(f"there is no checkpoint to go back to yet; {guard.report()}")
    curves.load_state_dict(drawn)


def _initial_model(context: StepContext, *, latent_channels: int, text_dim: int) -> MMDiT:
    """The stage before's weights; for the first stage those at `mmdit.path`, or fresh ones keyed by the seed."""
    if "previous" in context.inputs:
        return load_mmdit(context.inputs["previous"].folder("mmdit"))
    if context.recipe.mmdit.path is not None:
        return load_earlier(context.recipe.mmdit.path, context.recipe.mmdit.model, latent_channels=latent_channels, text_dim=text_dim)
    torch.manual_seed(context.recipe.seed)  # modules draw their initial weights from the global generator
    return MMDiT(context.recipe.mmdit.model, latent_channels=latent_channels, text_dim=text_dim)


def _publish(
    context: StepContext,
    ema: MMDiT,
    *,
    encoder: ConditionEncoder | None,
    empty: Condition,
    groups: RowGroups[LatentGroup],
    curves: Curves,
    ledger: Ledger,
    plan: Plan,
) -> dict[str, Any]:
    """Writes weights, curves and the ledger; returns the stage's losses. Raises LedgerError when the ledger does not add up."""
    assert context.stage is not None
    recipe, stage = context.recipe, context.recipe.mmdit.stages[context.stage]
    if problems := check_ledger(ledger, plan, groups):
        raise LedgerError("; ".join(problems))
    save_mmdit(ema, context.output / "mmdit")
    held_out = latent_rows(groups.index, kinds=stage.kinds, split=HELD_OUT)
    losses = validation_loss(ema, encoder, groups, held_out, seed=recipe.seed, empty=empty)
    context.log({f"val/loss/{kind}": loss for kind, loss in losses.items()}, step=stage.steps)
    history = context.inputs["previous"].read_json("history.json") if "previous" in context.inputs else []
    history.append({"stage": context.stage, "curves": curves.points, "validation": losses})
    for name, document in (("curves.json", curves.points), ("history.json", history), (LEDGER, ledger_document(ledger, plan))):
        (context.output / name).write_text(json.dumps(document, indent=1) + "\n")
    return {"loss": curves.last, **{f"val_loss_{kind}": loss for kind, loss in losses.items()}}
