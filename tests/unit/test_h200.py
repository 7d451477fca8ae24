"""One H200: that the recipe for it fits in memory and time by the plan, and that its benchmark runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import h200
from benchmarks.h200 import CASES, FULL, TINY, TINY_CASES, How, caption_lengths, measure, policies_that_fit, run_apart
from pipelines.cli import app
from pipelines.documents import find_recipe, find_site

SECONDS = 25 * 60
# What the recipe's comment reckons for all but train_vae and train_mmdit.
OTHER_STEPS_SECONDS = 180 + 90 + 200 + 60 + 220
VAE_FLOPS = 100e12  # a second; the comment's guess


@pytest.fixture(scope="module")
def planned() -> dict[str, Any]:
    options = ["--gpus", "1", "--gpu", "h200", "--mfu", "0.3", "--caption-tokens", "64", "--json"]
    result = CliRunner().invoke(app, ["plan", "h200", *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_recipe_is_done_within_25_minutes_at_30_percent_mfu(planned: dict[str, Any]) -> None:
    training = sum(stage["gpu_hours"] for stage in planned["stages"]) * 3600 + planned["vae_training_flops"] / VAE_FLOPS
    assert training + OTHER_STEPS_SECONDS <= SECONDS


def test_the_recipes_passes_fit_beside_its_state_with_nothing_computed_again(planned: dict[str, Any]) -> None:
    assert 100e6 < sum(planned["parameters"]["mmdit"].values()) < 1e9
    assert find_site("h200").launch.profile("train_mmdit").activation_checkpointing == "none"
    # Half of the room: what autograd keeps in fp32 of passes in bfloat16 where blocks are not compiled is not in the formula.
    assert find_recipe("h200").mmdit.micro_batch_tokens <= planned["memory"]["largest_micro_batch"]["none"] / 2
    assert find_recipe("h200").mmdit.micro_batch_tokens >= max(stage["longest_sample_tokens"] for stage in planned["stages"])


def test_the_recipe_has_stages_at_256_and_512_px_in_bfloat16() -> None:
    recipe = find_recipe("h200")
    assert [stage.resolution_px for stage in recipe.mmdit.stages.values()] == [256, 512]
    assert recipe.mmdit.precision == "bf16"
    assert recipe.data.scenes.size_px == recipe.text_images.size_px == 512


def test_caption_lengths_have_the_mean_that_is_asked_for() -> None:
    assert caption_lengths(100_000, 231.0).mean() == pytest.approx(231.0, rel=0.02)


def test_what_fits_beside_7_billion_parameters_in_fp32() -> None:
    h200_bytes = 143_771 * 2**20  # as nvidia-smi has it
    single, packed = (next(case for case in CASES if name in case.name) for name in ("1024px", "256px"))
    assert policies_that_fit(single, FULL, memory_bytes=h200_bytes)[-1] == "full"
    assert "none" not in policies_that_fit(single, FULL, memory_bytes=h200_bytes)  # 114 GB of state, 33 GB of activations
    assert "none" not in policies_that_fit(packed, FULL, memory_bytes=h200_bytes)
    assert policies_that_fit(single, FULL, memory_bytes=2 * h200_bytes) == ("none", "selective", "full")
    assert policies_that_fit(single, FULL, memory_bytes=80 * 10**9) == ("full",)


@pytest.mark.parametrize("case", TINY_CASES[1:], ids=lambda case: case.precision)
def test_a_measurement_of_small_sizes_is_told_as_a_cpus(case: h200.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h200, "compile_blocks", lambda model, *, backend: None)
    result = measure(case, TINY, How("full", warm_up=1, steps=2, profile=tmp_path))
    assert (result["device"], result["recompute"], result["steps"]) == ("cpu", "full", 2)
    assert "mfu" not in result
    assert result["tokens_per_second"] > 0
    assert "aten::mm" in (tmp_path / f"{case.name}.txt").read_text()
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n  in SomeError handler", "CUDA out of memory"),
        ("Traceback\nValueError: what\nlast", "ValueError: what"),
        ("", "exit code 1"),
    ],
)
def test_a_measurement_that_dies_is_a_line(monkeypatch: pytest.MonkeyPatch, stderr: str, said: str) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout="", stderr=stderr))
    result = run_apart(CASES[0], [], seconds=1)
    assert result["name"] == CASES[0].name
    assert said in result["failed"]


def test_a_measurement_out_of_memory_is_tried_again_with_more_computed_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def apart(case: h200.Case, arguments: list[str], *, seconds: float) -> dict[str, Any]:
        tried.append((case.name, arguments[1]))
        return {"name": case.name, "failed": "CUDA out of memory"} if arguments[1] != "full" else {"name": case.name, "step_seconds": 1.0}

    monkeypatch.setattr(h200, "run_apart", apart)
    h200.main(["--tiny", "--only", "64px"])
    assert tried == [("tiny-bf16-64px", policy) for policy in ("none", "selective", "full")]
    assert "step_seconds" in json.loads(capsys.readouterr().out.splitlines()[-1])
