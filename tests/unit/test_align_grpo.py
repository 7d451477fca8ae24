"""The step align_grpo: it raises what is rewarded, goes on after any stop as if there had been none, and notices broken rewards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model_core.context import StepContext
from model_core.documents import UserError
from model_core.recipe import RewardPhase, parse_recipe
from model_core.rewards.verdict import RewardUnavailable, Score, Scorer, ScoreRequest, Value
from model_core.steps import align_grpo
from model_core.steps.align_grpo import run
from model_core.training.guard import TrainingDiverged
from model_core.training.optim import Optimizer
from model_core.training.policy import Learner
from model_core.training.policy_update import PolicyUpdate
from model_core.training.stopping import Stopped, Stopping
from tests.alignment_parts import GRPO_SETTINGS, RECIPE, Scores, context_of, document, write_alignment_inputs
from tests.encoded_inputs import Input

GOLD = {"gold": "gold"}
FEW = {"alarms": {"window": 2}}


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Input]:
    return write_alignment_inputs(tmp_path_factory.mktemp("alignment"))


@pytest.fixture
def scored_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Scorer], None]:
    """Puts a scorer in the place of the recipe's rewards."""

    def put(scorer: Scorer) -> None:
        monkeypatch.setattr(align_grpo, "open_scorer", lambda *_args, **_kwargs: scorer)

    return put


def weights(context: StepContext) -> dict[str, torch.Tensor]:
    return load_file(context.output / "mmdit/model.safetensors")


def points(context: StepContext) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = document(context).points
    return found


def test_the_reward_rises_at_fixed_prompts_and_seeds(tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None]) -> None:
    scored_by(Scores())
    context = context_of(tmp_path, inputs, updates=12, lr=3e-3, num_fixed=6)
    stats = run(context)
    assert stats["reward_after"] > stats["reward_before"]
    assert stats["p"] < 0.05
    assert [point["update"] for point in points(context)] == list(range(12))
    assert all(point["ratio"] == 1.0 for point in points(context))


@pytest.mark.parametrize("where", ["in the rollout", "between rollout and update", "before the optimizer's step", "in the second pass"])
def test_a_kill_anywhere_leaves_no_trace(
    tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    scored_by(Scores())
    changed = {"updates_per_rollout": 2, "kl_weight": 0.1}
    quiet = context_of(tmp_path / "quiet", inputs, **changed)
    run(quiet)

    calls = {"count": 0}
    owner, name, fatal = {
        "in the rollout": (Scores, "score", 7),
        "between rollout and update": (PolicyUpdate, "_learn", 3),
        "before the optimizer's step": (Optimizer, "step", 5),
        "in the second pass": (Learner, "backward", 6),
    }[where]
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
    assert points(resumed) == points(quiet)
    assert (resumed.output / "prompts.jsonl").read_bytes() == (quiet.output / "prompts.jsonl").read_bytes()


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


def test_two_policies_are_trained_apart_and_merged_and_survive_a_kill(
    tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored_by(Scores())
    changed = {"policies": "two", "updates": 2, "merge_updates": 3}
    quiet = context_of(tmp_path / "quiet", inputs, **changed)
    run(quiet)
    assert [point["policy"] for point in points(quiet)] == ["image"] * 2 + ["edit"] * 2 + ["merged"] * 3
    losses = [point["merging_loss"] for point in points(quiet) if point["policy"] == "merged"]
    assert losses[-1] < losses[0]
    for fatal in (3, 6):  # in the second policy, and in the merging
        calls = {"count": 0}
        real = Optimizer.clip

        def dying(self: Optimizer, calls: dict[str, int] = calls, fatal: int = fatal, real: Any = real) -> Any:
            calls["count"] += 1
            if calls["count"] == fatal:
                raise Killed
            return real(self)

        with monkeypatch.context() as patch:
            patch.setattr(Optimizer, "clip", dying)
            with pytest.raises(Killed):
                run(context_of(tmp_path / f"killed-{fatal}", inputs, **changed))
        resumed = context_of(tmp_path / f"killed-{fatal}", inputs, **changed)
        run(resumed)
        assert all(torch.equal(value, weights(quiet)[key]) for key, value in weights(resumed).items())


def test_adapters_are_merged_into_what_is_published(tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None]) -> None:
    scored_by(Scores())
    context = context_of(tmp_path, inputs, lora_rank=2, lora_alpha=4.0, kl_weight=0.1)
    run(context)
    start = load_file(inputs["model"].folder("mmdit") / "model.safetensors")
    changed = {name for name, value in weights(context).items() if not torch.equal(value, start[name])}
    assert weights(context).keys() == start.keys()
    assert changed
    assert all(name.startswith("blocks.") for name in changed)


def test_every_change_of_weights_and_mix_is_recorded(tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None]) -> None:
    scored_by(Scores(gold=lambda value: value))
    phases = [
        {"weights": {"default": {"brightness": 1.0}}, "edit_share": 0.0},
        {"from_update": 2, "weights": {"default": {"brightness": 1.0, "other": 0.0}}, "edit_share": 1.0},
    ]
    context = context_of(tmp_path, inputs, schedule=phases)
    run(context)
    changes = document(context).changes
    assert [(change["update"], change["edit_share"]) for change in changes] == [(0, 0.0), (2, 1.0)]
    ledger = [json.loads(line) for line in (context.output / "prompts.jsonl").read_text().splitlines()]
    assert {line["category"] == "edit" for line in ledger if line["update"] >= 2} == {True}
    assert {line["category"] == "edit" for line in ledger if line["update"] < 2} == {False}


def test_prompts_whose_pictures_are_all_as_good_are_left_out_and_noted(
    tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None]
) -> None:
    scored_by(Scores())
    context = context_of(tmp_path, inputs, updates=1, min_range=10.0)
    run(context)
    ledger = [json.loads(line) for line in (context.output / "prompts.jsonl").read_text().splitlines()]
    assert {line["outcome"] for line in ledger} == {"dropped: range too small"}
    start = load_file(inputs["model"].folder("mmdit") / "model.safetensors")
    assert all(torch.equal(value, start[name]) for name, value in weights(context).items())


@pytest.mark.parametrize(
    ("scorer", "told"),
    [
        (Scores(lambda _: 0.5, gold=lambda value: value), "brightness gives all pictures of a prompt one value"),
        (Scores(lambda value: -value, gold=lambda value: value), "agrees with what is trained on by -1.00"),
        (Scores(lambda _: math.nan, gold=lambda value: value), "100% of the scores of brightness are invalid"),
    ],
    ids=["constant", "inverted", "nan"],
)
def test_a_broken_reward_stops_the_training_with_an_alarm(
    tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None], scorer: Scorer, told: str
) -> None:
    scored_by(scorer)
    with pytest.raises(TrainingDiverged, match="alarm at update 1") as raised:
        run(context_of(tmp_path, inputs, **GOLD, **FEW))
    assert told in str(raised.value)


def test_a_reward_that_times_out_is_an_error_and_no_score(
    tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None]
) -> None:
    class Slow(Scores):
        def score(self, requests: list[ScoreRequest]) -> list[dict[str, Score]]:  # type: ignore[override]
            raise RewardUnavailable("http://rewards: no answer for 900 s")

    scored_by(Slow())
    with pytest.raises(RewardUnavailable, match="no answer"):
        run(context_of(tmp_path, inputs))


def test_one_reward_without_a_value_does_not_stop_the_others(
    tmp_path: Path, inputs: dict[str, Input], scored_by: Callable[[Scorer], None]
) -> None:
    class Sometimes(Scores):
        def score(self, requests: list[ScoreRequest]) -> list[dict[str, Score]]:  # type: ignore[override]
            found = super().score(requests)
            return [{"brightness": Value(math.nan)} if index == 0 else scores for index, scores in enumerate(found)]

    scored_by(Sometimes())
    stats = run(context_of(tmp_path, inputs))
    assert any("brightness: not finite" in warning for warning in stats["warnings"])


@pytest.mark.parametrize(
    ("grpo", "told"),
    [
        ({"window_range": [0, 4]}, "window_range"),
        ({"window_steps": 4}, "window_steps 4"),
        ({"gold": "brightness"}, "gold 'brightness' is trained on"),
        ({"schedule": [{"from_update": 3}]}, "schedule begins at updates"),
        ({"schedule": [{"weights": {"edit": {"a": 1.0}}}]}, "there must be a `default`"),
        ({"schedule": [{"weights": {"default": {"a": 0.0}}}]}, "no weight above 0 for category 'default'"),
        ({"clip": 2.0}, "clip 2.0"),
        ({"guidance_mode": "both"}, "grpo.guidance_mode"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(grpo: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=r"recipe") as raised:
        parse_recipe(RECIPE | {"grpo": GRPO_SETTINGS | grpo}, "recipe")
    assert told in str(raised.value)


@pytest.mark.parametrize("step", ["align_grpo", "distill_dmd", "train_vae"])
def test_sharded_layouts_of_steps_that_have_none_are_refused_with_the_site(step: str) -> None:
    from model_core.site import parse_site

    with pytest.raises(UserError, match=rf"steps\.{step}: found shard fsdp and context_parallel 1; allowed are none and 1"):
        parse_site({"launch": {"steps": {step: {"shard": "fsdp"}}}}, "site")
    with pytest.raises(UserError, match=r"default: found shard hsdp and context_parallel 1; allowed are none and 1"):
        parse_site({"launch": {"default": {"shard": "hsdp"}}}, "site")


def test_a_recipe_without_the_section_has_nothing_to_align(tmp_path: Path, inputs: dict[str, Input]) -> None:
    from dataclasses import replace

    with pytest.raises(UserError, match="found no grpo"):
        run(replace(context_of(tmp_path, inputs), recipe=parse_recipe(RECIPE, "recipe")))


def test_the_phase_of_an_update_is_the_newest_that_has_begun() -> None:
    recipe = parse_recipe(RECIPE | {"grpo": GRPO_SETTINGS | {"schedule": [{}, {"from_update": 5, "edit_share": 0.7}]}}, "recipe")
    assert recipe.grpo is not None
    assert [recipe.grpo.phase(update).edit_share for update in (0, 4, 5, 99)] == [RewardPhase().edit_share] * 2 + [0.7] * 2
