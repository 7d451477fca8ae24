"""The step align_enhancer: it raises what is rewarded, goes on after any stop as if there had been none, and notices broken rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model_core.context import StepContext
from model_core.documents import UserError
from model_core.models.enhancer import PromptEnhancer, load_enhancer
from model_core.recipe import parse_recipe
from model_core.rewards.opening import check_rewards
from model_core.rewards.verdict import Score, Scorer, ScoreRequest, Value
from model_core.site import parse_site
from model_core.steps import align_enhancer
from model_core.steps.align_enhancer import run
from model_core.training.enhancer_update import MAX_UPDATES_WITHOUT_SIGNAL
from model_core.training.guard import TrainingDiverged
from model_core.training.optim import Optimizer
from model_core.training.stopping import Stopped, Stopping
from tests.alignment_parts import GRPO_SETTINGS, Scores
from tests.encoded_inputs import Input
from tests.enhancer_parts import RECIPE, SETTINGS, context_of, document, write_enhancer_inputs

KNOWN = GRPO_SETTINGS | {"schedule": [{"weights": {"default": {"alignment": 1.0}}}]}
RULES = {"weights": {"text_constraints": 1.0}, "edit_weights": {"text_constraints": 1.0}}


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Input]:
    return write_enhancer_inputs(tmp_path_factory.mktemp("enhancement"))


@pytest.fixture
def scored_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Scorer], None]:
    """Puts a scorer in the place of the recipe's rewards."""

    def put(scorer: Scorer) -> None:
        monkeypatch.setattr(align_enhancer, "open_scorer", lambda *_args, **_kwargs: scorer)

    return put


def weights(context: StepContext) -> dict[str, torch.Tensor]:
    return load_file(context.output / "enhancer/model.safetensors")


def test_answers_come_to_keep_the_rules_that_are_rewarded(
    tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None]
) -> None:
    scored_by(Scores())
    context = context_of(tmp_path, inputs, updates=12, group_size=8, lr=2e-3, checkpoint_every_updates=100, **RULES)
    stats = run(context)
    points = document(context).points
    assert points[0]["valid"] < 0.6
    assert sum(point["valid"] for point in points[-5:]) / 5 > points[0]["valid"] + 0.2
    assert all(point["ratio"] == 1.0 for point in points if "ratio" in point)
    assert all(point["length"] <= point["length_max"] <= 40 for point in points)
    assert stats["updates"] == 12
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


def test_a_kill_in_the_second_pass_of_an_update_leaves_no_trace(
    tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored_by(Scores())
    changed = {"updates": 3, "updates_per_rollout": 2, "kl_weight": 0.1}
    quiet = context_of(tmp_path / "quiet", inputs, **changed)
    run(quiet)
    calls, real = {"count": 0}, Optimizer.step

    def dying(self: Optimizer, step: int) -> None:
        calls["count"] += 1
        if calls["count"] == 4:
            raise Killed
        real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", dying)
        with pytest.raises(Killed):
            run(context_of(tmp_path / "killed", inputs, **changed))
    resumed = context_of(tmp_path / "killed", inputs, **changed)
    run(resumed)
    assert all(torch.equal(value, weights(quiet)[key]) for key, value in weights(resumed).items())
    assert (resumed.output / "enhancement.json").read_bytes() == (quiet.output / "enhancement.json").read_bytes()
    assert any(point.get("kl", 0) > 0 for point in document(quiet).points)


def test_a_told_stop_is_saved_and_goes_on_bit_for_bit(
    tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored_by(Scores())
    quiet = context_of(tmp_path / "quiet", inputs, updates=3, checkpoint_every_updates=100)
    run(quiet)
    answers = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(Stopping, "agreed", lambda _self, _ranks: next(answers))
        with pytest.raises(Stopped, match="after update 2, which is saved"):
            run(context_of(tmp_path / "told", inputs, updates=3, checkpoint_every_updates=100))
    resumed = context_of(tmp_path / "told", inputs, updates=3, checkpoint_every_updates=100)
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


def test_rewards_that_nothing_gives_are_refused_before_any_work(tmp_path: Path) -> None:
    site = parse_site({"workspace": str(tmp_path)}, "site")
    recipe = parse_recipe(RECIPE | {"grpo": KNOWN, "enhancer_grpo": SETTINGS}, "recipe")
    with pytest.raises(UserError, match=r"enhancer_grpo: found the rewards brightness; allowed are text_constraints, aesthetics"):
        check_rewards(recipe, site)
    check_rewards(parse_recipe(RECIPE | {"grpo": KNOWN, "enhancer_grpo": SETTINGS | RULES}, "recipe"), site)


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
