"""What alignment has changed: the same prompts and seeds drawn by the model before and after, scored by the rewards and by the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from model_core.data.buckets import fit
from model_core.data.edits import Edit
from model_core.data.keys import keyed_generator
from model_core.data.prompts import PolicyPrompt, prompts_of_update
from model_core.data.shards import encode_image
from model_core.data.synthetic import held_out_scenes
from model_core.evaluation.attributes import plain_prompts, shares
from model_core.evaluation.drawing import Painter, Request, draw
from model_core.evaluation.edits import judge_edit, scene_edits
from model_core.evaluation.judge import Judge
from model_core.recipe import Recipe
from model_core.rewards.verdict import Scorer
from model_core.training.rollouts import score_request
from model_core.training.tally import Weights, make_tally

NUM_SIGN_FLIPS = 9_999  # of the paired test; the least p it can give is 1e-4


@dataclass(frozen=True)
class FixedPrompt:
    """A prompt and the seed that it is always drawn with; `asked` and `edit` are for the judge, who reads plain scenes alone."""

    prompt: PolicyPrompt
    seed: int
    asked: Mapping[str, str]
    edit: Edit | None = None


@dataclass(frozen=True)
class Drawn:
    """Pictures of the fixed prompts: total reward of each (NaN where none is valid), each reward's mean, and the judge's scores."""

    pictures: list[Image.Image]
    totals: np.ndarray
    rewards: dict[str, float]
    judge: dict[str, float]


def fixed_prompts(
    recipe: Recipe, prompts: Mapping[str, Sequence[PolicyPrompt]], *, num: int, size_px: tuple[int, int]
) -> list[FixedPrompt]:
    """`num` prompts and as many edits: of held-out scenes where the data are scenes, else of the policy's own prompts."""
    seed, scenes = recipe.seed, recipe.data.scenes
    if not any("shape" in prompt.notes for prompt in prompts["image"]):
        chosen = [*prompts_of_update(prompts, 0, 2 * num, edit_share=0.5, seed=seed)]
        return [FixedPrompt(prompt, index, {}) for index, prompt in enumerate(chosen)]
    fixed = []
    for prompt, scene in zip(plain_prompts(num, scenes, seed=seed), held_out_scenes(num, scenes, seed=seed), strict=True):
        category = "text" if "text" in prompt.asked else "scene"
        asked = PolicyPrompt(
            prompt_id=f"fixed-{prompt.seed}", prompt=prompt.text, category=category, size_px=size_px, notes=scene.to_dict()
        )
        fixed.append(FixedPrompt(asked, prompt.seed, prompt.asked))
    for index, edit in enumerate(scene_edits(num, recipe.edits.operations, scenes, seed=seed) if prompts["edit"] else []):
        fitted = replace(edit, references=[fit(image, size_px) for image in edit.references], target=fit(edit.target, size_px))
        asked = PolicyPrompt(
            prompt_id=f"fixed-edit-{index}",
            prompt=edit.instruction,
            category="edit",
            size_px=size_px,
            encoded=[encode_image(image) for image in fitted.references],
            notes=edit.notes,
        )
        fixed.append(FixedPrompt(asked, index, {}, fitted))
    return fixed


def draw_fixed(painter: Painter, fixed: Sequence[FixedPrompt], scorer: Scorer, weights: Weights, judge: Judge | None, *, key: str) -> Drawn:
    """Draws and scores the fixed prompts as an evaluation samples them; `key` names the model in the scorer's requests."""
    requests = [Request(each.prompt.prompt, each.seed, each.prompt.size_px, each.prompt.sources) for each in fixed]
    pictures = draw(painter, requests, on_drawn=lambda _: None)
    asked = [
        score_request(each.prompt, picture, each.prompt.sources, key=f"{key}/fixed/{index}")
        for index, (each, picture) in enumerate(zip(fixed, pictures, strict=True))
    ]
    tally = make_tally(
        [[scores] for scores in scorer.score(asked)], names=scorer.names, categories=[each.prompt.category for each in fixed]
    )
    totals, counted = tally.totals(weights)
    values = np.where(counted[:, 0].numpy(), totals[:, 0].numpy(), np.nan)
    return Drawn(pictures, values, tally.means(), {} if judge is None else judged(judge, fixed, pictures))


def judged(judge: Judge, fixed: Sequence[FixedPrompt], pictures: Sequence[Image.Image]) -> dict[str, float]:
    """The judge's verdict on plain scenes and their edits, under evaluate_model's names."""
    prompts, success, consistency = [], [], []
    for each, picture in zip(fixed, pictures, strict=True):
        reading = judge.read(picture)
        if each.asked:
            prompts.append({name: getattr(reading, name) == value for name, value in each.asked.items()})
        if each.edit is not None:
            verdict = judge_edit(each.edit, picture, reading)
            success.append(verdict.success)
            consistency.append(verdict.consistency)
    scores = {f"judge/{name}": value for name, value in shares(prompts).items()} if prompts else {}
    if success:
        scores |= {"edit/success": float(np.mean(success)), "edit/consistency": float(np.mean(consistency))}
    return scores


def compare(before: Drawn, after: Drawn, *, spread: float, seed: int) -> dict[str, Any]:
    """What rose and what fell. `spread` is the total's deviation within a group: the unit that `gain` is told in.

    `p` is that of a paired sign-flip test of the totals' mean difference being above 0.
    """
    differences = (after.totals - before.totals)[~np.isnan(after.totals - before.totals)]
    gain = float(differences.mean()) if len(differences) else float("nan")
    return {
        "reward": {"before": float(np.nanmean(before.totals)), "after": float(np.nanmean(after.totals))},
        "gain_in_spreads": gain / spread if spread > 0 else None,
        "p": sign_flip_p(differences, seed=seed),
        "rewards": {name: {"before": before.rewards[name], "after": after.rewards.get(name)} for name in before.rewards},
        "judge": {name: {"before": value, "after": after.judge[name]} for name, value in before.judge.items()},
    }


def sign_flip_p(differences: np.ndarray, *, seed: int) -> float:
    """Probability of a mean at least as large if each difference were as likely of either sign (one-sided, keyed, Fisher 1935)."""
    flips = keyed_generator(seed, "sign flips").choice((-1.0, 1.0), size=(NUM_SIGN_FLIPS, len(differences)))
    as_large = int((flips @ differences >= differences.sum() - 1e-12).sum())
    return (1 + as_large) / (1 + NUM_SIGN_FLIPS)
