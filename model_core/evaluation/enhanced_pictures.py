"""What enhancing is worth: requests drawn as they stand, enhanced by the supervised model, and by the aligned one, with equal seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from model_core.data.prompts import PolicyPrompt
from model_core.data.short_requests import ShortRequest, short_request
from model_core.data.synthetic import asked_in, scene_in
from model_core.evaluation.before_after import Drawn, FixedPrompt, fixed_prompts, judged, sign_flip_p
from model_core.evaluation.drawing import Painter
from model_core.evaluation.judge import Judge
from model_core.models.condition import ConditionEncoder
from model_core.models.enhancer import PromptEnhancer
from model_core.recipe import Recipe
from model_core.recipe_enhancer import Degradation
from model_core.rewards.verdict import Scorer
from model_core.training.enhancer_rollouts import Candidate, draw_prompts, read_candidate, score_pictures
from model_core.training.tally import Weights, make_tally

OWN, SUPERVISED, ALIGNED = "own", "supervised", "aligned"
WAYS = (OWN, SUPERVISED, ALIGNED)
WARNED = ("judge/mean", "edit/success")  # what of the judge's scores a reader is warned of when it falls


@dataclass(frozen=True)
class FixedRequest:
    """A short request, and what it is held to: the seed that it is always drawn with, and what the judge looks for."""

    asked: ShortRequest
    fixed: FixedPrompt


def fixed_requests(
    recipe: Recipe,
    rates: Mapping[Degradation, float],
    prompts: Mapping[str, Sequence[PolicyPrompt]],
    *,
    num: int,
    size_px: tuple[int, int],
) -> list[FixedRequest]:
    """`num` short requests for pictures and as many for edits: of held-out scenes where the data are scenes, else of the policy's own.

    The judge looks for what a request names or lets infer; what it leaves open may be drawn either way.
    """
    found = []
    for index, each in enumerate(fixed_prompts(recipe, prompts, num=num, size_px=size_px)):
        asked = short_request(each.prompt, rates, recipe.seed, "fixed request", index)
        scene = scene_in(asked.meant.notes) if each.asked else None
        looked_for = {} if scene is None else asked_in(scene, asked.meant.prompt)
        looked_for = {name: value for name, value in looked_for.items() if name not in asked.left_open}
        found.append(FixedRequest(asked, replace(each, prompt=asked.meant, asked=looked_for)))
    return found


def answer_greedily(
    enhancer: PromptEnhancer, encoder: ConditionEncoder, requests: Sequence[FixedRequest], *, max_new_tokens: int
) -> list[Candidate]:
    """The likeliest answer to each request."""
    tokens = enhancer.generate(
        [each.asked.request for each in requests],
        num_images=[len(each.asked.meant.encoded) for each in requests],
        max_new_tokens=max_new_tokens,
    )
    return [read_candidate(enhancer, encoder, each.asked, answer) for each, answer in zip(requests, tokens, strict=True)]


def draw_requests(
    painter: Painter,
    requests: Sequence[FixedRequest],
    prompts: Mapping[str, Sequence[str]],
    scorer: Scorer,
    weights: Weights,
    judge: Judge | None,
    *,
    key: str,
) -> dict[str, Drawn]:
    """Pictures of each request by each way's `prompts`, scored by rewards of pictures alone, and read by the judge."""
    asked, seeds = [each.asked for each in requests], [each.fixed.seed for each in requests]
    grouped = draw_prompts(painter, asked, list(zip(*prompts.values(), strict=True)), seeds)
    scores = score_pictures(scorer, asked, grouped, key=f"{key}/fixed")
    drawn = {}
    for number, way in enumerate(prompts):
        pictures = [group[number] for group in grouped]
        tally = make_tally([[row[number]] for row in scores], names=scorer.names, categories=[one.meant.category for one in asked])
        totals, counted = tally.totals(weights)
        values = np.where(counted[:, 0].numpy(), totals[:, 0].numpy(), np.nan)
        read = {} if judge is None else judged(judge, [each.fixed for each in requests], pictures)
        drawn[way] = Drawn(pictures, values, tally.means(), read)
    return drawn


def compare_ways(drawn: Mapping[str, Drawn], answers: Mapping[str, Sequence[Candidate]], *, seed: int) -> dict[str, Any]:
    """What rose and what fell, in JSON values.

    `p` is that of a paired sign-flip test of the aligned model's mean reward being above the supervised one's. `valid` is the share of
    answers that follow the schema, `kept` the share that break no rule.
    """
    gain = drawn[ALIGNED].totals - drawn[SUPERVISED].totals
    return {
        "judge": {way: each.judge for way, each in drawn.items()},
        "reward": {way: _mean(each.totals) for way, each in drawn.items()},
        "rewards": {way: each.rewards for way, each in drawn.items()},
        "p": sign_flip_p(gain[~np.isnan(gain)], seed=seed),
        "valid": {way: float(np.mean([one.is_valid for one in found])) for way, found in answers.items()},
        "kept": {way: float(np.mean([one.is_valid and not one.problems for one in found])) for way, found in answers.items()},
    }


def losses(comparison: Mapping[str, Any]) -> list[str]:
    """Warnings: what the aligned model does worse than the supervised one, or than no enhancing at all."""
    judge, found = comparison["judge"], []
    for before, told in ((SUPERVISED, "with the supervised model"), (OWN, "with the user's own words")):
        pairs = {"reward": (comparison["reward"][before], comparison["reward"][ALIGNED])}
        pairs |= {name: (judge[before][name], judge[ALIGNED][name]) for name in WARNED if name in judge[before]}
        for name, (was, now) in pairs.items():
            if was is not None and now is not None and now < was:
                found.append(f"{name} is {now:.4f} with the aligned enhancer, below {was:.4f} {told}")
    return found


def _mean(values: np.ndarray) -> float | None:
    """Mean of the values that there are, None without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
