"""The report card of a reward model: how well it orders pairs that it never saw, and what it can be fooled with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from model_core.data.keys import keyed_generator, keyed_permutation
from model_core.data.preferences import png
from model_core.data.reward_pairs import Pair
from model_core.evaluation.pair_judgements import judge_pairs, ordered
from model_core.evaluation.perturbations import PERTURBATIONS, perturbed
from model_core.models.reward import RewardModel
from model_core.objectives.preference import TIE, A, B, calibration_error

FILE_NAME = "report_card.json"
BOOTSTRAP_DRAWS = 1000
REPEATS = 3
SAME = 1e-3  # values on the scale of 1 to 5 that differ by less are the same: float sums depend on what else is in a batch


def report_card(model: RewardModel, *, validation: Sequence[Pair], test: Sequence[Pair], seed: int) -> dict[str, Any]:
    """The card, as JSON values. The model is calibrated; ties are told apart by a margin fitted on the validation pairs."""
    judged = judge_pairs(model, test)
    values, key = judged.values(model.calibration), (seed, "report card", model.dimension)
    margin = fit_tie_margin(judge_pairs(model, validation).values(model.calibration), validation)
    right = np.array([is_right(value, pair) for value, pair in zip(values, test, strict=True)])
    compared = np.array([pair.label != TIE for pair in test])
    right_3way = three_way(values, margin=margin) == np.array([pair.label for pair in test])
    deltas, a_is_better = ordered(values, test)
    temperature = model.calibration.temperature
    prompts = [pair.prompt_id for pair in test]
    errors = [value - score for pair, row in zip(test, values, strict=True) for value, score in zip(row, pair.scores, strict=True)]
    known = np.array([error for error in errors if np.isfinite(error)])
    return {
        "dimension": model.dimension,
        "pairs": len(test),
        "ties": int((~compared).sum()),
        "accuracy": share_with_interval(right[compared], [prompt for prompt, kept in zip(prompts, compared, strict=True) if kept], *key),
        "accuracy_3way": share_with_interval(right_3way.astype(float), prompts, *key),
        "tie_rule": {"tie_if_values_differ_by_at_most": margin},
        "accuracy_by_head": {
            "score": _accuracy(judged.expected, test),
            "preference": _accuracy(judged.mean, test),
        },
        "accuracy_by_reason": by_group(right[compared], [pair.reason for pair in test if pair.label != TIE]),
        "accuracy_by_category": by_group(right[compared], [pair.category for pair in test if pair.label != TIE]),
        "score_error": float(np.sqrt(np.mean(known**2))) if known.size else None,
        "calibration": asdict(model.calibration),
        "ece_before": calibration_error(deltas, a_is_better),
        "ece_after": calibration_error(deltas, a_is_better, temperature=temperature),
        "swap": swap_consistency(model, test, values),
        "repeats": repeat_spread(model, test, *key),
        "perturbations": {name: battery for name in PERTURBATIONS if (battery := fall(model, test, values, name)) is not None},
    }


def warnings_of(card: dict[str, Any], *, at_least: float) -> list[str]:
    """What a reader must know before this reward steers anything."""
    name, accuracy = card["dimension"], card["accuracy"]
    warnings = []
    if accuracy["value"] < at_least:
        warnings.append(f"{name}: accuracy {accuracy['value']:.3f} on {accuracy['num']} test pairs is below {at_least}")
    for perturbation, found in card["perturbations"].items():
        if found["must_fall"] and found["mean_change"] >= 0:
            warnings.append(f"{name}: {perturbation} raises the value by {found['mean_change']:.3f} on average; it must lower it")
    if card["swap"]["share"] < 1.0:
        warnings.append(f"{name}: {1 - card['swap']['share']:.3f} of answers change with the side a picture is on")
    return warnings


def is_right(values: np.ndarray, pair: Pair) -> float:
    """1 where the better of two values is the pair's, half where they are equal; of a tie, NaN."""
    if pair.label == TIE:
        return float("nan")
    if values[0] == values[1]:
        return 0.5
    return float((values[0] > values[1]) == (pair.label == A))


def three_way(values: np.ndarray, *, margin: float) -> np.ndarray:
    """A, B or TIE for (N, 2) values: a tie where they differ by no more than `margin`."""
    deltas = values[:, 0] - values[:, 1]
    return np.where(np.abs(deltas) <= margin, TIE, np.where(deltas > 0, A, B))


def fit_tie_margin(values: np.ndarray, pairs: Sequence[Pair]) -> float:
    """The margin of `three_way` that is right most often, the smallest of equally good ones."""
    labels = np.array([pair.label for pair in pairs])
    margins = np.unique(np.concatenate([[0.0], np.abs(values[:, 0] - values[:, 1])]))
    return float(margins[int(np.argmax([(three_way(values, margin=margin) == labels).mean() for margin in margins]))])


def share_with_interval(right: np.ndarray, prompts: Sequence[str], *key: object) -> dict[str, float]:
    """The mean of (N,) with the 95 % interval of a bootstrap that draws whole prompts, keyed."""
    names = sorted(set(prompts))
    places = {name: place for place, name in enumerate(names)}
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    for value, prompt in zip(right, prompts, strict=True):
        sums[places[prompt]] += value
        counts[places[prompt]] += 1
    drawn = keyed_generator(*key, "bootstrap").integers(len(names), size=(BOOTSTRAP_DRAWS, len(names)))
    low, high = np.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [0.025, 0.975])
    return {"value": float(np.mean(right)), "low": float(low), "high": float(high), "num": len(right)}


def by_group(right: np.ndarray, groups: Sequence[str]) -> dict[str, dict[str, float]]:
    """Accuracy and number of pairs a group."""
    numbers = np.array(groups)
    return {name: {"value": float(right[numbers == name].mean()), "num": int((numbers == name).sum())} for name in sorted(set(groups))}


def swap_consistency(model: RewardModel, pairs: Sequence[Pair], values: np.ndarray) -> dict[str, float]:
    """Share of pairs whose answer is the other side's when a and b are exchanged, and by how much a picture's value changes."""
    swapped = judge_pairs(model, [replace(pair, image_a=pair.image_b, image_b=pair.image_a) for pair in pairs]).values(model.calibration)
    before, after = values[:, 0] - values[:, 1], swapped[:, 0] - swapped[:, 1]
    agree = (np.sign(before) == -np.sign(after)) | ((np.abs(before) < SAME) & (np.abs(after) < SAME))
    return {"share": float(agree.mean()), "largest_change": float(np.abs(values - swapped[:, ::-1]).max())}


def repeat_spread(model: RewardModel, pairs: Sequence[Pair], *key: object) -> dict[str, float]:
    """Mean deviation of a picture's value over several passes in other company, beside the mean difference within a pair."""
    rounds = []
    for number in range(REPEATS):
        order = keyed_permutation(len(pairs), *key, "repeat", number)
        found = judge_pairs(model, [pairs[place] for place in order]).values(model.calibration)
        rounds.append(found[np.argsort(order)])
    deviation = float(np.std(np.stack(rounds), axis=0).mean())
    return {"deviation": deviation, "difference_in_a_pair": float(np.abs(rounds[0][:, 0] - rounds[0][:, 1]).mean())}


def fall(model: RewardModel, pairs: Sequence[Pair], values: np.ndarray, name: str) -> dict[str, Any] | None:
    """How the value of good pictures changes under a perturbation; None where it applies to none."""
    changed: list[Pair] = []
    before: list[float] = []
    for pair, value in zip(pairs, values, strict=True):
        side = next((side for side, fits in zip("ab", pair.fits, strict=True) if fits), None)
        picture = perturbed(pair, side, name) if side else None
        if picture is not None:
            changed.append(replace(pair, image_a=png(picture), image_b=png(picture)))
            before.append(float(value["ab".index(str(side))]))
    if not changed:
        return None
    changes = judge_pairs(model, changed).values(model.calibration)[:, 0] - np.array(before)
    must_fall = model.dimension in PERTURBATIONS[name][1]
    return {"num": len(changed), "mean_change": float(changes.mean()), "share_lower": float((changes < 0).mean()), "must_fall": must_fall}


def _accuracy(read: np.ndarray, pairs: Sequence[Pair]) -> float:
    return float(np.nanmean([is_right(values, pair) for values, pair in zip(read, pairs, strict=True)]))
