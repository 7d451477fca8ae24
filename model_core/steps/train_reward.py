"""train_reward: one of the five reward models (R1: each is the same recipe on its own preferences); the stage is its dimension.

Takes preference pairs; leaves the calibrated model in `reward/`, `report_card.json` and the curves. It is trained on the training
split, calibrated on the validation split, and its report card is of the test split. Resumes bitwise from its newest checkpoint:
every draw is keyed by its step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_core.context import StepContext
from model_core.data.preferences import FILE_NAME as PREFERENCES
from model_core.data.reward_pairs import LabelledPairs, Pair, batch_places, read_pairs
from model_core.evaluation.pair_judgements import fit_calibration, judge, judge_pairs
from model_core.evaluation.reward_card import FILE_NAME as REPORT_CARD
from model_core.evaluation.reward_card import report_card, warnings_of
from model_core.models.reward import RewardModel, open_reward_trunk, save_reward, tiny_reward
from model_core.objectives.preference import pointwise_loss, uncertain_preference_loss
from model_core.recipe import DIMENSIONS, Dimension, Reward
from model_core.training.curves import Curves
from model_core.training.distributed import compute_device, keep_deterministic
from model_core.training.guarded import resume_guarded, train_guarded

BETAS = (0.9, 0.98)
FEW_RIGHT = 0.8  # accuracy below which the report warns


def run(context: StepContext) -> dict[str, Any]:
    """Trains to the end; returns the report card's figures, counts and times."""
    seed, dimension = context.recipe.seed, _dimension(context)
    config = context.recipe.reward.of(dimension)
    device = compute_device(context.ranks)
    keep_deterministic(device)
    began = time.monotonic()
    pairs = read_pairs(context.inputs["preferences"].path(PREFERENCES), dimension=dimension)
    train = pairs.by_split["train"]
    model = _initial_model(config, train, dimension=dimension, seed=seed).to(device)
    training = resume_guarded(context, model, config=config, betas=BETAS, losses=("loss", "pairwise", "pointwise", "caption"))
    curves, guard = training.curves, training.guard
    data_seconds = time.monotonic() - began

    def backward(step: int) -> Tensor:
        places = batch_places(len(train), config.batch_size, step=step, key=(seed, "reward", dimension))
        loss, parts = losses(model, [train[place] for place in places], config)
        loss.backward()
        return torch.stack([loss.detach(), *parts])

    seconds = train_guarded(context, training, backward=backward, lr_field="reward.lr")

    began = time.monotonic()
    card = _publish(context, model.eval().requires_grad_(False), pairs, curves)
    return {
        "accuracy": card["accuracy"]["value"],
        "accuracy_low": card["accuracy"]["low"],
        "accuracy_high": card["accuracy"]["high"],
        "accuracy_3way": card["accuracy_3way"]["value"],
        "ece_before": card["ece_before"],
        "ece_after": card["ece_after"],
        "swap_consistency": card["swap"]["share"],
        "loss": curves.last,
        "steps": config.steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{f"{split}_pairs": len(rows) for split, rows in pairs.by_split.items()},
        **{f"{label}_pairs": num for label, num in sorted(pairs.skipped.items())},
        "skipped_steps": len(guard.events),
        "rollbacks": guard.num_rollbacks,
        "warnings": [*warnings_of(card, at_least=FEW_RIGHT), *guard.warnings],
        "data_seconds": round(data_seconds, 3),
        "train_seconds": round(seconds, 3),
        "evaluation_seconds": round(time.monotonic() - began, 3),
        "pairs_per_second": round((config.steps - training.first) * config.batch_size / max(seconds, 1e-9), 1),
    }


def losses(model: RewardModel, pairs: Sequence[Pair], config: Reward) -> tuple[Tensor, Tensor]:
    """The weighted loss of a batch, and its detached parts: pairwise, pointwise and caption.

    The caption's is the prompt's negative log-likelihood under pictures that are all it says; 0 where the dimension is not about it.
    """
    said = judge(model, pairs)
    device, num = said.mean.device, len(pairs)
    labels = torch.tensor([pair.label for pair in pairs], device=device)
    variances = (2 * said.log_deviation).exp()
    deltas, variance = said.mean[:num] - said.mean[num:], variances[:num] + variances[num:]
    pairwise = uncertain_preference_loss(deltas, variance, labels, k=config.tie_ratio).mean()
    scores = torch.tensor([pair.scores for pair in pairs], device=device).T.flatten()
    known = scores.isfinite()
    pointwise = (pointwise_loss(said.logits, scores.nan_to_num()) * known).sum() / known.sum().clamp_min(1)
    fits = torch.tensor([pair.fits for pair in pairs], device=device).T.flatten()
    caption = -(said.log_likelihood * fits).sum() / fits.sum().clamp_min(1)
    parts = torch.stack([pairwise, pointwise, caption])
    return parts @ parts.new_tensor([config.pairwise_weight, config.pointwise_weight, config.caption_weight]), parts.detach()


def _dimension(context: StepContext) -> Dimension:
    for dimension in DIMENSIONS:
        if dimension == context.stage:
            return dimension
    raise ValueError(f"found stage {context.stage!r}; allowed are {', '.join(DIMENSIONS)}")


def _initial_model(config: Reward, train: Sequence[Pair], *, dimension: Dimension, seed: int) -> RewardModel:
    """Fresh heads, whose weights no generator draws, on the trunk at `reward.trunk.path` or a tiny one keyed by the seed."""
    if config.trunk.path is not None:
        return open_reward_trunk(Path(config.trunk.path).expanduser(), dimension=dimension, image_px=config.trunk.image_px)
    most = max(len(pair.sources) for pair in train)
    return tiny_reward(config.trunk, [pair.prompt for pair in train], dimension=dimension, num_sources=most, seed=seed)


def _publish(context: StepContext, model: RewardModel, pairs: LabelledPairs, curves: Curves) -> dict[str, Any]:
    """Calibrates the model, writes it with its curves and report card, and returns the card."""
    config, validation = context.recipe.reward.of(_dimension(context)), pairs.by_split["validation"]
    # Scores serve where they were trained on; people who only compare give none.
    scored = config.pointwise_weight > 0 and any(score == score for pair in pairs.by_split["train"] for score in pair.scores)
    judged = judge_pairs(model, validation)
    model.calibration = fit_calibration(judged, validation, scored=scored, compared=config.pairwise_weight > 0)
    save_reward(model, context.output / "reward")
    card = report_card(model, validation=validation, test=pairs.by_split["test"], seed=context.recipe.seed)
    context.log({"test/accuracy": card["accuracy"]["value"], "test/accuracy_3way": card["accuracy_3way"]["value"]}, step=config.steps)
    for name, document in (("curves.json", curves.points), (REPORT_CARD, card)):
        (context.output / name).write_text(json.dumps(document, indent=1) + "\n")
    return card
