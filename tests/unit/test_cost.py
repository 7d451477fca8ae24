"""`darkroom plan`: figures that follow from the recipe by hand, and that nothing is built to find them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from model_core.data.plan import Rows, make_plan
from model_core.data.reads import row_group_reads
from pipelines.cli import app


def plan(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["plan", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def paper() -> dict[str, Any]:
    return plan("qwen_image_2", "--gpus", "1024")


def test_the_tables_name_every_stage_and_what_does_not_fit() -> None:
    result = CliRunner().invoke(app, ["plan", "qwen_image_2", "--gpus", "1024", "--gpu", "h200", "--mfu", "0.4"])
    assert result.exit_code == 0, result.output
    shown = result.stdout
    expected = ("7,115,124,736", "8,767,123,696", "S4x1024", "S6x2048", "960,000", "AdamW's moments", "does not fit", "GPU hours", "GETs")
    assert [words for words in expected if words not in shown] == []
    assert max(len(line) for line in shown.splitlines()) <= 120


def test_planning_loads_no_torch_and_allocates_no_weights() -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30)); "  # the weights alone would take 28 GB
        "from typer.testing import CliRunner; from pipelines.cli import app; "
        "result = CliRunner().invoke(app, ['plan', 'qwen_image_2', '--gpus', '1024', '--json']); "
        "print(result.exit_code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]


def test_tokens_are_those_of_prompts_targets_and_references(paper: dict[str, Any]) -> None:
    stages = {stage["name"]: stage for stage in paper["stages"]}
    assert stages["S1"]["tokens_a_step"] == 32768 * (256 + 256)
    # Of three edit operations one has two references, the others one.
    assert stages["S5x2048"]["tokens_a_step"] == pytest.approx(4096 * (256 + 16384 + 0.3 * 4 / 3 * 16384), rel=1e-6)
    assert stages["S5x2048"]["longest_sample_tokens"] == 256 + 3 * 16384
    assert stages["S1"]["tokens"] == 300_000 * stages["S1"]["tokens_a_step"]


def test_gpu_hours_are_flops_over_the_peak_at_the_assumed_mfu(paper: dict[str, Any]) -> None:
    stage = paper["stages"][0]
    assert stage["training_flops"] == pytest.approx(300_000 * 32768 * 21.9e12, rel=0.015)
    assert stage["encoder_flops"] == pytest.approx(300_000 * 32768 * 3.59e12, rel=0.01)
    assert stage["gpu_hours"] == pytest.approx((stage["training_flops"] + stage["encoder_flops"]) / (989e12 * 0.4) / 3600)
    assert stage["days"] == pytest.approx(stage["gpu_hours"] / 1024 / 24)


def test_totals_are_sums(paper: dict[str, Any]) -> None:
    assert paper["totals"]["steps"] == 960_000
    hours = sum(stage["gpu_hours"] for stage in paper["stages"]) + paper["vae_gpu_hours"]
    assert paper["totals"]["gpu_hours"] == pytest.approx(hours)


def test_twice_the_mfu_or_the_peak_is_half_the_time() -> None:
    first, second = plan("demo", "--mfu", "0.2"), plan("demo", "--mfu", "0.4")
    assert first["totals"]["gpu_hours"] == pytest.approx(2 * second["totals"]["gpu_hours"])
    assert plan("demo", "--peak-tflops", "494.5")["totals"]["gpu_hours"] == pytest.approx(first["totals"]["gpu_hours"])


def test_checkpoints_hold_16_bytes_a_parameter_and_weights_4(paper: dict[str, Any]) -> None:
    stage = paper["stages"][0]
    num = sum(paper["parameters"]["mmdit"].values())
    assert stage["checkpoints"] == 299  # every 1000 of 300,000 steps, but for the last, which is published
    assert stage["written_bytes"] == 299 * 16 * num + 4 * num


def test_shards_share_the_state_and_nothing_else(paper: dict[str, Any]) -> None:
    replica = plan("qwen_image_2", "--gpus", "1024", "--shards", "8")
    alone, shared = replica["memory"]["state"], paper["memory"]["state"]
    assert alone["optimizer"] == pytest.approx(128 * shared["optimizer"], rel=1e-6)
    assert alone["encoder"] == shared["encoder"]
    assert replica["memory"]["largest_micro_batch"]["full"] < paper["memory"]["largest_micro_batch"]["full"]


def test_one_gpu_reads_every_latent_once() -> None:
    stage = plan("qwen_image_2", "--set", "mmdit.window_row_groups=8")["stages"][0]
    latent_bytes = 2 * 64 * 256
    assert stage["read_bytes"] == pytest.approx(300_000 * 32768 * latent_bytes, rel=1e-6)
    assert stage["read_requests"] == pytest.approx(stage["read_bytes"] / 2**24, rel=1e-6)


def fetches_a_step(*, groups: int, rows: int, batch: int, window: int, ranks: int, steps: int) -> float:
    """Row groups that ranks fetch by the real order of samples, each keeping as many in memory as train_mmdit lets it."""
    order = make_plan(
        digest="d",
        seed=0,
        stage="S1",
        rows={"image": Rows(np.arange(groups), np.full(groups, rows))},
        shares={"image": 1.0},
        batch_size=batch,
        window=window,
    )
    kept: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(ranks)]
    fetched = 0
    for number in range(steps):
        for rank, memory in enumerate(kept):
            for group in np.unique(order.share(number, rank=rank, size=ranks).groups).tolist():
                fetched += group not in memory
                memory[group] = None
                memory.move_to_end(group)
                if len(memory) > 2 * (window + 1):
                    memory.popitem(last=False)
    return fetched / steps


@pytest.mark.parametrize(
    ("rows", "batch", "window", "ranks", "steps"),
    [(32, 64, 8, 1, 20), (32, 64, 8, 8, 24), (32, 64, 16, 16, 24), (32, 32, 8, 4, 40), (64, 256, 64, 64, 16)],
)
def test_predicted_fetches_are_those_of_the_real_order(rows: int, batch: int, window: int, ranks: int, steps: int) -> None:
    real = fetches_a_step(groups=4 * window, rows=rows, batch=batch, window=window, ranks=ranks, steps=steps)
    assert row_group_reads(samples=batch, rows=rows, window=window, ranks=ranks) == pytest.approx(real, rel=0.15)


def test_a_batch_of_whole_windows_takes_at_most_one_more_fetch_a_cut() -> None:
    real = fetches_a_step(groups=64, rows=32, batch=512, window=4, ranks=10, steps=4)
    predicted = row_group_reads(samples=512, rows=32, window=4, ranks=10)
    assert 16 <= real <= predicted <= 16 + 9


def test_more_fetches_than_row_groups_times_ranks_are_never_predicted() -> None:
    assert row_group_reads(samples=4, rows=32, window=8, ranks=64) <= 64 * 4 / 32
