"""Training of a model on one rank under a guard, as reward models and the Prompt Enhancer are: resumable, logged, stopped by SIGTERM."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from model_core.context import StepContext
from model_core.recipe import Reward
from model_core.recipe_enhancer import Enhancer
from model_core.training.checkpoint import CheckpointStore, Stateful
from model_core.training.curves import Curves
from model_core.training.guard import StepGuard, TrainingDiverged
from model_core.training.optim import Optimizer
from model_core.training.stopping import Stopped, noting_sigterm


@dataclass(frozen=True, kw_only=True)
class GuardedTraining:
    """What a guarded loop trains with, and the step that it goes on from; checkpoints hold the parts."""

    config: Reward | Enhancer
    optimizer: Optimizer
    curves: Curves
    guard: StepGuard
    parts: Mapping[str, Stateful]
    first: int


def resume_guarded(
    context: StepContext, model: nn.Module, *, config: Reward | Enhancer, betas: tuple[float, float], losses: tuple[str, ...]
) -> GuardedTraining:
    """The training of `model` from its newest checkpoint, or from step 0; `losses` names what `backward` gives, the total first."""
    optimizer = Optimizer(
        model,
        lr=config.lr,
        warmup_steps=config.warmup_steps,
        betas=betas,
        weight_decay=config.weight_decay,
        grad_clip=config.grad_clip,
        decay_over=range(round(config.steps * (1 - config.decay_share)), config.steps),
    )
    curves, guard = Curves(*losses, "grad_norm"), StepGuard(config.guard)
    parts: dict[str, Stateful] = {"model": model, "optimizer": optimizer, "curves": curves}
    found = context.checkpoints.restore(parts)
    if found is not None:
        guard.load_state_dict(found.notes["guard"])
    first = 0 if found is None else found.step
    return GuardedTraining(config=config, optimizer=optimizer, curves=curves, guard=guard, parts=parts, first=first)


def train_guarded(context: StepContext, training: GuardedTraining, *, backward: Callable[[int], Tensor], lr_field: str) -> float:
    """Trains to the end; returns the seconds it took.

    `backward(step)` adds the step's gradients and returns its detached losses (L,), the total first. `lr_field` is the recipe's
    field of the learning rate, for advice. Raises Stopped after SIGTERM, and TrainingDiverged when the loss does not come back.
    """
    config, optimizer, curves, guard = training.config, training.optimizer, training.curves, training.guard
    began = time.monotonic()
    with noting_sigterm() as stop:
        for step in range(training.first, config.steps):
            losses = backward(step)
            norm, done = optimizer.clip(), step + 1
            verdict = guard.judge(done, loss=losses[0].item(), grad_norm=norm.item())
            if verdict == "good":
                optimizer.step(step)
                curves.add(*losses.cpu(), norm.cpu())
            else:
                optimizer.clear()
                context.say(guard.newest)
            if verdict == "roll back":
                roll_back(context.checkpoints, training.parts, curves, lr_field=lr_field)
            if (done % config.log_every_steps == 0 or done == config.steps) and curves.count:
                point = curves.close(done)
                context.log({f"train/{name}": value for name, value in point.items() if name != "step"}, step=done)
            stopped = done < config.steps and stop.agreed(context.ranks)
            due = stopped or done % config.checkpoint_every_steps == 0 or verdict == "roll back"
            if due and guard.calm and done < config.steps:
                context.checkpoints.save(done, training.parts, notes={"guard": guard.state_dict(), "recipe": context.recipe.digest()})
            if stopped:
                context.checkpoints.wait()
                saved = "which is saved" if guard.calm else "among bad ones, which is not saved"
                raise Stopped(f"told to stop after step {done}, {saved}; the same command goes on from the newest checkpoint")
            context.show(done, config.steps, f"loss {curves.last:.4f}" if curves.points else "")
    return time.monotonic() - began


def roll_back(checkpoints: CheckpointStore, parts: Mapping[str, Stateful], curves: Curves, *, lr_field: str) -> None:
    """Gives weights and moments back what the newest checkpoint holds; curves and data go on."""
    drawn = copy.deepcopy(curves.state_dict())  # restoring writes into the tensors that are there
    if checkpoints.restore(parts) is None:
        raise TrainingDiverged(f"there is no checkpoint to go back to yet; a lower {lr_field} or a longer warm-up may help")
    curves.load_state_dict(drawn)
