"""The step align_enhancer: it raises what is rewarded, goes on after any stop as if there had been none, and notices when nothing is learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model_core.context import StepContext
from model_core.data.prompts import PolicyPrompt
from model_core.data.short_requests import short_request
from model_core.data.synthetic import Scene, asked_in
from model_core.documents import UserError
from model_core.evaluation.drawing import Painter, open_painter
from model_core.evaluation.enhanced_pictures import fixed_requests, losses
from model_core.models.enhancer import PromptEnhancer, load_enhancer
from model_core.recipe import Sampling, parse_recipe
from model_core.recipe_enhancer import DEGRADATIONS
from model_core.rewards.verdict import Score, Scorer, ScoreRequest, Value
from model_core.steps import align_enhancer
from model_core.steps.align_enhancer import run
from model_core.training.enhancer_rollouts import draw_prompts, read_candidate, sample_candidates, score_pictures
from model_core.training.enhancer_update import MAX_UPDATES_WITHOUT_SIGNAL
from model_core.training.guard import TrainingDiverged
from model_core.training.optim import Optimizer
from model_core.training.stopping import Stopped, Stopping
from tests.alignment_parts import Scores
from tests.encoded_inputs import Input
from tests.enhancer_parts import IMAGE_ANSWERS, RECIPE, SETTINGS, context_of, document, write_enhancer_inputs

RATES = dict.fromkeys(DEGRADATIONS, 0.5)
RULES = {"weights": {"text_constraints": 1.0}, "edit_weights": {"text_constraints": 1.0}}


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


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


@pytest.fixture
def scored_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Scorer], None]:
    """Puts a scorer in the place of the recipe's rewards."""

    def put(scorer: Scorer) -> None:
        monkeypatch.setattr(align_enhancer, "open_scorer", lambda *_args, **_kwargs: scorer)

    return put


def weights(context: StepContext) -> dict[str, torch.Tensor]:
    return load_file(context.output / "enhancer/model.safetensors")


def prompt(caption: str, scene: Scene | None = None) -> PolicyPrompt:
    notes = {} if scene is None else scene.to_dict()
    return PolicyPrompt(prompt_id="one", prompt=caption, category="image", size_px=(64, 64), notes=notes)


def test_answers_come_to_keep_the_rules_that_are_rewarded(
    tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None]
) -> None:
    scored_by(Scores())
    context = context_of(tmp_path, inputs, updates=20, group_size=8, lr=5e-3, **RULES)
    stats = run(context)
    points = document(context).points
    first, last = (sum(point["valid"] for point in part) / 5 for part in (points[:5], points[-5:]))
    assert first < 0.7
    assert last > first + 0.2
    assert all(point["ratio"] == 1.0 for point in points if "ratio" in point)
    assert all(point["length"] <= point["length_max"] <= 40 for point in points)
    assert stats["updates"] == 20
    assert (context.output / "enhancer_card.json").read_text() == '{"valid": 0.5}\n'


def test_what_the_pictures_earn_is_compared_in_three_ways(
    tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None]
) -> None:
    scored_by(Scores())
    context = context_of(tmp_path, inputs, updates=1)
    stats = run(context)
    found = document(context)
    assert {*found.comparison["reward"]} == {"own", "supervised", "aligned"}
    assert 0 < found.comparison["p"] <= 1
    assert {*found.comparison["valid"]} == {*found.comparison["kept"]} == {"supervised", "aligned"}
    for each in found.shown:
        assert {"request", "thoughts", "prompt", "pictures"} <= {*each}
        assert all((context.output / name).is_file() for name in each["pictures"].values())
    assert any("no plain scenes" in warning for warning in stats["warnings"])
    again = load_enhancer(context.output / "enhancer")
    assert all(torch.isfinite(value).all() for value in again.state_dict().values())


@pytest.mark.parametrize("where", ["in the scoring", "before the optimizer's step"])
def test_a_kill_anywhere_leaves_no_trace(
    tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    scored_by(Scores())
    changed = {"updates_per_rollout": 2, "kl_weight": 0.1}
    quiet = context_of(tmp_path / "quiet", inputs, **changed)
    run(quiet)
    calls = {"count": 0}
    owner, name, fatal = {"in the scoring": (Scores, "score", 3), "before the optimizer's step": (Optimizer, "step", 6)}[where]
    real = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls["count"] += 1
        if calls["count"] == fatal:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            run(context_of(tmp_path / "killed", inputs, **changed))
    resumed = context_of(tmp_path / "killed", inputs, **changed)
    run(resumed)
    assert calls["count"] == fatal
    assert all(torch.equal(value, weights(quiet)[key]) for key, value in weights(resumed).items())
    assert (resumed.output / "enhancement.json").read_bytes() == (quiet.output / "enhancement.json").read_bytes()
    assert any(point.get("kl", 0) > 0 for point in document(quiet).points)


def test_a_told_stop_is_saved_and_goes_on_bit_for_bit(
    tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored_by(Scores())
    quiet = context_of(tmp_path / "quiet", inputs, checkpoint_every_updates=100)
    run(quiet)
    answers = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(Stopping, "agreed", lambda _self, _ranks: next(answers))
        with pytest.raises(Stopped, match="after update 2, which is saved"):
            run(context_of(tmp_path / "told", inputs, checkpoint_every_updates=100))
    resumed = context_of(tmp_path / "told", inputs, checkpoint_every_updates=100)
    run(resumed)
    assert all(torch.equal(value, weights(quiet)[key]) for key, value in weights(resumed).items())


def test_a_reward_that_is_one_value_stops_the_training(
    tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None]
) -> None:
    scored_by(Scores(lambda _: 0.5))
    only = {"weights": {"brightness": 1.0}, "edit_weights": {"brightness": 1.0}}
    with pytest.raises(TrainingDiverged, match="all rewarded alike") as raised:
        run(context_of(tmp_path, inputs, updates=20, **only))
    assert f"alarm at update {MAX_UPDATES_WITHOUT_SIGNAL - 1}" in str(raised.value)


def test_a_reward_without_a_value_stops_the_training(tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None]) -> None:
    scored_by(Scores(lambda _: math.nan))
    only = {"weights": {"brightness": 1.0}, "edit_weights": {"brightness": 1.0}}
    with pytest.raises(TrainingDiverged, match="all rewarded alike"):
        run(context_of(tmp_path, inputs, updates=20, **only))


def test_answers_that_never_keep_the_schema_stop_the_training(
    tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored_by(Scores())
    monkeypatch.setattr(PromptEnhancer, "text", lambda _self, _ids: "no answer")
    with pytest.raises(TrainingDiverged, match="no answer of 5 updates in a row follows the schema"):
        run(context_of(tmp_path, inputs, updates=20))


def test_a_loss_that_is_not_finite_stops_the_training(
    tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored_by(Scores())
    real = PromptEnhancer.log_probs
    monkeypatch.setattr(PromptEnhancer, "log_probs", lambda *given: [value * math.nan for value in real(*given)])
    with pytest.raises(TrainingDiverged, match=r"update 0: found loss nan .* a lower enhancer_grpo.lr may help"):
        run(context_of(tmp_path, inputs))


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
    asked = [replace(short_request(prompt(f"a general {number}"), {}, 0), meant=replace(prompt("a"), prompt_id=f"{number}")) for number in (1, 2)]
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


def test_what_fell_is_told() -> None:
    ways = ("own", "supervised", "aligned")
    comparison = {
        "reward": dict(zip(ways, (0.2, 0.5, 0.4), strict=True)),
        "judge": {way: {"judge/mean": value} for way, value in zip(ways, (0.6, 0.7, 0.8), strict=True)},
    }
    assert losses(comparison) == ["reward is 0.4000 with the aligned enhancer, below 0.5000 with the supervised model"]
    comparison["judge"]["aligned"]["judge/mean"] = 0.5
    assert len(losses(comparison)) == 3


def test_a_recipe_without_the_section_has_nothing_to_align(tmp_path: Path, inputs: dict[str, Input]) -> None:
    with pytest.raises(UserError, match="found no enhancer_grpo"):
        run(replace(context_of(tmp_path, inputs), recipe=parse_recipe(RECIPE, "recipe")))


def test_the_generator_is_not_trained(tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None]) -> None:
    class Steady(Scores):
        def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
            return [{"brightness": Value(float(index))} for index, _ in enumerate(requests)]

    before = (inputs["generator"].folder("mmdit") / "model.safetensors").read_bytes()
    scored_by(Steady())
    context = context_of(tmp_path, inputs, updates=1)
    run(context)
    assert (inputs["generator"].folder("mmdit") / "model.safetensors").read_bytes() == before
    assert not (context.output / "mmdit").exists()
