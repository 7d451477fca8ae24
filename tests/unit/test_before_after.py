"""The comparison before and after alignment: fixed prompts, paired differences, and a p-value that is what it says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from model_core.data.keys import keyed_generator
from model_core.data.prompts import PolicyPrompt
from model_core.data.synthetic import held_out_scenes, render
from model_core.evaluation.before_after import Drawn, compare, fixed_prompts, judged, sign_flip_p
from model_core.evaluation.judge import Judge
from model_core.recipe import parse_recipe

RECIPE = parse_recipe({"name": "tiny", "mmdit": {"stages": {"S1": {"resolution_px": 64}}}}, "recipe")
SCENE_NOTES = {"shape": "circle"}


def pool(**notes: str) -> list[PolicyPrompt]:
    return [PolicyPrompt(prompt_id=str(number), prompt="a photo", category="image", size_px=(64, 64), notes=notes) for number in range(3)]


def drawn(totals: list[float], **rewards: float) -> Drawn:
    return Drawn([Image.new("RGB", (8, 8))] * len(totals), np.array(totals), rewards, {"judge/text": totals[0]})


def test_the_sign_flip_test_is_exact_on_few_differences() -> None:
    differences = np.array([0.4, 0.1, -0.2, 0.3, 0.25, 0.15, -0.05, 0.5])
    flips = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    exact = float((flips @ differences >= differences.sum() - 1e-12).mean())
    assert sign_flip_p(differences, seed=0) == pytest.approx(exact, abs=0.005)


def test_noise_is_significant_as_often_as_the_level_says() -> None:
    values = [sign_flip_p(keyed_generator("noise", run).normal(size=30), seed=0) for run in range(200)]
    assert 0.01 <= np.mean(np.array(values) < 0.05) <= 0.10


def test_a_rise_is_told_in_deviations_of_a_group_and_pairs_without_a_value_are_left_out() -> None:
    found = compare(drawn([0.2, 0.4, float("nan")], a=0.3), drawn([0.3, 0.5, 0.9], a=0.4), spread=0.05, seed=0)
    assert found["gain_in_spreads"] == pytest.approx(2.0)
    assert found["rewards"] == {"a": {"before": 0.3, "after": 0.4}}
    assert found["judge"] == {"judge/text": {"before": 0.2, "after": 0.3}}


def test_scenes_are_compared_on_held_out_ones_and_their_edits() -> None:
    fixed = fixed_prompts(RECIPE, {"image": pool(**SCENE_NOTES), "edit": pool()}, num=6, size_px=(64, 64))
    prompts, edits = fixed[:6], fixed[6:]
    assert [each.prompt.notes for each in prompts] == [scene.to_dict() for scene in held_out_scenes(6, RECIPE.data.scenes, seed=0)]
    assert {each.prompt.category for each in edits} == {"edit"}
    assert all(each.edit is not None and len(each.prompt.encoded) in (1, 2) for each in edits)


def test_other_pictures_are_compared_on_the_policys_own_prompts() -> None:
    fixed = fixed_prompts(RECIPE, {"image": pool(), "edit": []}, num=2, size_px=(64, 64))
    assert [each.prompt.prompt for each in fixed] == ["a photo"] * 4
    assert not any(each.asked or each.edit for each in fixed)


def test_the_judge_gives_perfect_pictures_full_marks() -> None:
    fixed = fixed_prompts(RECIPE, {"image": pool(**SCENE_NOTES), "edit": pool()}, num=8, size_px=(64, 64))
    scenes = held_out_scenes(8, RECIPE.data.scenes, seed=0)
    pictures = [render(scene, 64, "perfect", index) for index, scene in enumerate(scenes)]
    pictures += [each.edit.target for each in fixed[8:] if each.edit is not None]
    found = judged(Judge(RECIPE.data.scenes), fixed, pictures)
    assert found["judge/mean"] == found["edit/success"] == 1.0
