"""Rollouts of the Prompt Enhancer: what becomes of answers, what pictures are held against, what the judge looks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from model_core.data.prompts import PolicyPrompt
from model_core.data.short_requests import ShortRequest, short_request
from model_core.data.synthetic import Scene, asked_in
from model_core.evaluation.drawing import Painter, open_painter
from model_core.evaluation.enhanced_pictures import draw_requests, fixed_requests, losses
from model_core.evaluation.judge import Judge
from model_core.models.enhancer import PromptEnhancer, load_enhancer
from model_core.recipe import Sampling, parse_recipe
from model_core.recipe_enhancer import DEGRADATIONS
from model_core.rewards.verdict import Score, ScoreRequest
from model_core.training.enhancer_rollouts import draw_prompts, read_candidate, sample_candidates, score_pictures
from tests.alignment_parts import Scores
from tests.encoded_inputs import Input
from tests.enhancer_parts import IMAGE_ANSWERS, RECIPE, SETTINGS, write_enhancer_inputs

RATES = dict.fromkeys(DEGRADATIONS, 0.5)


class Keeps(Scores):
    """Remembers what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[ScoreRequest] = []

    def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
        self.asked += requests
        return super().score(requests)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Input]:
    return write_enhancer_inputs(tmp_path_factory.mktemp("enhancement"))


@pytest.fixture(scope="module")
def painter(inputs: dict[str, Input]) -> Painter:
    folders = {"mmdit": inputs["generator"].folder("mmdit"), "vae": inputs["vae"].folder("vae")}
    return open_painter(**folders, encoder=inputs["encoder"].folder("encoder"), sampling=Sampling(steps=2, guidance_scale=1.0))


@pytest.fixture(scope="module")
def enhancer(inputs: dict[str, Input]) -> PromptEnhancer:
    return load_enhancer(inputs["enhancer"].folder("enhancer"))


def prompt(caption: str, scene: Scene | None = None) -> PolicyPrompt:
    notes = {} if scene is None else scene.to_dict()
    return PolicyPrompt(prompt_id="one", prompt=caption, category="image", size_px=(64, 64), notes=notes)


def test_an_answer_that_may_not_be_used_leaves_the_users_own_words(enhancer: PromptEnhancer, painter: Painter) -> None:
    plain = short_request(prompt("a general 3"), {}, 0)
    quoted = replace(plain, request='a sign with "EXIT"')
    good = enhancer.answer_ids(IMAGE_ANSWERS[0])
    read = [
        read_candidate(enhancer, painter.encoder, *given)
        for given in ((plain, good), (plain, good[:-1]), (quoted, good), (plain, enhancer.answer_ids("a red circle")))
    ]
    assert [each.drawn for each in read] == ["a general red", "a general red", 'a sign with "EXIT"', "a general 3"]
    assert [each.constraints for each in read] == [1.0, 1.0, 0.5, 0.0]
    assert [each.cut for each in read] == [False, True, False, False]


def test_a_prompt_that_the_generator_cannot_read_is_not_drawn(enhancer: PromptEnhancer, painter: Painter) -> None:
    asked = short_request(prompt("a general 3"), {}, 0)
    for long in ("word " * 60, "a <|image_pad|> circle"):
        answer = IMAGE_ANSWERS[0].replace("a general red", long)
        monkey = read_candidate(_Says(answer), painter.encoder, asked, [_Says.end_id])  # type: ignore[arg-type]
        assert monkey.is_valid
        assert monkey.drawn == asked.request
        assert monkey.constraints == 0.5


class _Says:
    """Stands for an enhancer whose every answer is one text."""

    end_id = 1

    def __init__(self, answer: str) -> None:
        self._answer = answer

    def text(self, _ids: Sequence[int]) -> str:
        return self._answer


def test_candidates_depend_on_their_keys_alone(enhancer: PromptEnhancer, painter: Painter) -> None:
    asked = [ShortRequest("a general 1", replace(prompt("a"), prompt_id=one)) for one in ("first", "second")]
    settings: dict[str, Any] = {"group_size": 3, "max_new_tokens": 40, "seed": 0}
    both = sample_candidates(enhancer, painter.encoder, asked, update=5, **settings)
    assert sample_candidates(enhancer, painter.encoder, asked[1:], update=5, **settings) == both[1:]
    assert sample_candidates(enhancer, painter.encoder, asked, update=6, **settings) != both


def test_pictures_of_a_group_share_their_noise_and_are_held_against_what_is_meant(painter: Painter) -> None:
    asked = [replace(short_request(prompt("a red circle on the left"), {}, 0), request="a circle")]
    (pictures,) = draw_prompts(painter, asked, [["red", "blue", "red"]], [7])
    assert pictures[0].tobytes() == pictures[2].tobytes()
    assert pictures[0].tobytes() != pictures[1].tobytes()
    (alone,) = draw_prompts(painter, asked, [["blue"]], [7])
    assert alone[0].tobytes() == pictures[1].tobytes()
    scorer = Keeps()
    score_pictures(scorer, asked, [pictures], key="k")
    assert {request.prompt for request in scorer.asked} == {"a red circle on the left"}
    assert len({request.key for request in scorer.asked}) == 2


def test_short_requests_of_scenes_mean_the_whole_scene() -> None:
    scene = Scene("red", "circle", "left", "white", "A7")
    for draw in range(20):
        asked = short_request(prompt("a red circle on the left with the text A7", scene), RATES, draw)
        assert asked_in(scene, asked.meant.prompt) == scene.to_dict()
        assert '"A7"' in asked.request
        assert not {*asked.left_open} & {*asked_in(scene, asked.request)}


def test_the_judge_looks_only_for_what_a_request_tells() -> None:
    recipe = parse_recipe(RECIPE | {"enhancer_grpo": SETTINGS}, "recipe")
    scene = Scene("red", "circle", "left", "white", "A7")
    pools = {"image": [prompt("a red circle on the left", scene)], "edit": []}
    everything = fixed_requests(recipe, {}, pools, num=20, size_px=(64, 64))
    assert all(len(each.fixed.asked) == 5 for each in everything)
    without = fixed_requests(recipe, {"background": 1.0}, pools, num=20, size_px=(64, 64))
    told = {("background" in each.fixed.asked, "background" in each.asked.left_open) for each in without}
    assert told == {(True, False), (False, True)}


def test_scenes_and_edits_are_drawn_in_each_way_and_read_by_the_judge(painter: Painter) -> None:
    recipe = parse_recipe(RECIPE | {"enhancer_grpo": SETTINGS}, "recipe")
    scene = Scene("red", "circle", "left", "white", "A7")
    pools = {"image": [prompt("a red circle on the left", scene)], "edit": [prompt("any edit")]}
    requests = fixed_requests(recipe, RATES, pools, num=2, size_px=(64, 64))
    assert [len(each.asked.meant.encoded) > 0 for each in requests] == [False, False, True, True]
    prompts = {way: [each.asked.request for each in requests] for way in ("own", "aligned")}
    prompts["meant"] = [each.asked.meant.prompt for each in requests]
    scorer = Keeps()
    drawn = draw_requests(painter, requests, prompts, scorer, {"default": {"brightness": 1.0}}, Judge(recipe.data.scenes), key="k")
    assert [one.tobytes() for one in drawn["own"].pictures] == [one.tobytes() for one in drawn["aligned"].pictures]
    assert [one.tobytes() for one in drawn["own"].pictures] != [one.tobytes() for one in drawn["meant"].pictures]
    assert {request.prompt for request in scorer.asked} == {each.asked.meant.prompt for each in requests}
    assert all({"judge/mean", "edit/success"} <= {*each.judge} for each in drawn.values())


def test_what_fell_is_told() -> None:
    ways = ("own", "supervised", "aligned")
    comparison = {
        "reward": dict(zip(ways, (0.2, 0.5, 0.4), strict=True)),
        "judge": {way: {"judge/mean": value} for way, value in zip(ways, (0.6, 0.7, 0.8), strict=True)},
    }
    assert losses(comparison) == ["reward is 0.4000 with the aligned enhancer, below 0.5000 with the supervised model"]
    comparison["judge"]["aligned"]["judge/mean"] = 0.5
    assert len(losses(comparison)) == 3
