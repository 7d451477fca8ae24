"""Training killed at ten random moments in turn, on one to three ranks: the same samples, losses and weights come out.

The steps are started as a launcher would, so that nothing but the kills and the number of ranks differs from a quiet run.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from model_core.recipe import load_recipe
from tests.integration.conftest import Darkroom

STEPS = {"train_vae": 40, "train_mmdit": 60}
RECIPE = Path(__file__).parents[2] / "pipelines/recipes/smoke.yaml"
# Ranks add up gradients in another order. Flow matching is smooth; the autoencoder's losses have kinks (L1, hinges), where rounding
# decides the side (tests/unit/test_train_vae.py proves the ranks' sum in double precision).
TOLERANCE = {"train_vae": 1e-4, "train_mmdit": 1e-5}
RUNNING = re.compile(rb"resumed after step|\d+/\d+ \d+%")


class Step:
    """A training step of a variant of smoke in a workspace of its own, whose inputs are those of the undisturbed run."""

    def __init__(self, here: Path, step: str, inputs: dict[str, Path]) -> None:
        self.here, self.step = here, step
        here.mkdir()
        document = load_recipe(RECIPE).model_dump(mode="json")
        training = {"log_every_steps": 1, "checkpoint_every_steps": 3}
        document["vae"] |= {**training, "steps": STEPS["train_vae"]}
        document["mmdit"] |= training
        document["mmdit"]["stages"]["S1"] |= {"steps": STEPS["train_mmdit"]}
        (here / "recipe.yaml").write_text(yaml.safe_dump(document))
        (here / "site.yaml").write_text(yaml.safe_dump({"workspace": str(here / "workspace")}))
        self.arguments = [step, "--recipe", "recipe.yaml", "--site", "site.yaml", "--run", "kills", "--output", "manifest.json"]
        self.arguments += ["--stage", "S1"] if step == "train_mmdit" else []
        for name, path in inputs.items():
            self.arguments += ["--input", f"{name}={path}"]

    def start(self, ranks: int) -> subprocess.Popen[bytes]:
        program = ["model_core"] if ranks == 1 else ["model_core.torchrun", str(ranks)]
        return subprocess.Popen(
            [sys.executable, "-m", *program, *self.arguments],
            cwd=self.here,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )

    def finish(self, ranks: int) -> Path:
        """Runs to the end; returns the folder of the result."""
        process = self.start(ranks)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output.decode()
        return next((self.here / "workspace" / self.step).iterdir())

    def kill(self, ranks: int, draw: random.Random) -> bool:
        """Starts, and ends by SIGKILL a random moment after training has begun; false when it was done before that."""
        process = self.start(ranks)
        wait_for_training(process)
        time.sleep(draw.uniform(0.0, 0.5))
        claims = list((self.here / "workspace" / self.step).glob("*/claim.json"))
        # Either the whole step dies, as with its machine, or the first rank alone, as for want of memory.
        victim = process.pid if ranks == 1 or draw.random() < 0.5 or not claims else int(json.loads(claims[0].read_bytes())["pid"])
        alive = process.poll() is None
        with suppress(ProcessLookupError):  # it was done a moment ago
            os.kill(victim, signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        assert process.returncode in (0, 20, -signal.SIGKILL), output.decode()
        return alive and process.returncode != 0


def wait_for_training(process: subprocess.Popen[bytes]) -> None:
    """Reads the step's lines until one tells of optimizer steps."""
    assert process.stdout is not None
    for line in process.stdout:
        if RUNNING.search(line):
            return
    raise AssertionError("the step ended before it trained")


def inputs_of(step: str, workspace: Path, told: dict[str, Any]) -> dict[str, Path]:
    """The manifests that a step of the undisturbed run has taken."""
    keys = {(entry["step"], entry["stage"]): entry["key"] for entry in told["steps"]}
    names = {
        "train_vae": {
            "kept": ("filter_images", "S1"),
            "images": ("ingest_images", None),
            "text_images": ("render_text", None),
            "edits": ("build_edits", None),
        },
        "train_mmdit": {"latents": ("encode_latents", "S1"), "encoder": ("prepare_encoder", None)},
    }[step]
    return {name: workspace / made[0] / keys[made] / "manifest.json" for name, made in names.items()}


@pytest.mark.parametrize(
    ("step", "num_kills", "ranks"),
    [("train_mmdit", 10, "one"), ("train_mmdit", 10, "random"), ("train_vae", 5, "random")],
)
def test_kills_change_nothing(darkroom: Darkroom, first: dict[str, Any], tmp_path: Path, step: str, num_kills: int, ranks: str) -> None:
    inputs = inputs_of(step, darkroom.workspace, first)
    quiet = Step(tmp_path / "quiet", step, inputs).finish(1)
    disturbed = Step(tmp_path / "disturbed", step, inputs)
    draw = random.Random(f"{step} {ranks}")
    sizes = [1 if ranks == "one" else draw.randint(1, 3) for _ in range(num_kills + 1)]
    kills = sum(disturbed.kill(size, draw) for size in sizes[:-1])
    result = disturbed.finish(sizes[-1])
    assert kills > num_kills // 2, f"{kills} kills met a living step: it has too few steps for this machine"

    points = [json.loads((folder / "curves.json").read_bytes()) for folder in (quiet, result)]
    assert [point["step"] for point in points[1]] == list(range(1, STEPS[step] + 1))
    for before, after in zip(*points, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=TOLERANCE[step]), f"step {before['step']}, ranks {sizes}"
    if step == "train_mmdit":
        assert (quiet / "ledger.json").read_bytes() == (result / "ledger.json").read_bytes()
    if ranks == "one":
        files = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")} for folder in (quiet, result)]
        assert files[0] == files[1]
        assert files[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_between_two_steps_and_the_next_attempt_goes_on_from_there(
    darkroom: Darkroom, first: dict[str, Any], tmp_path: Path, ranks: int
) -> None:
    step = Step(tmp_path / "stopped", "train_mmdit", inputs_of("train_mmdit", darkroom.workspace, first))
    process = step.start(ranks)
    wait_for_training(process)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 20, output.decode()
    told = re.search(rb"told to stop after step (\d+), which is saved", output)
    assert told, output.decode()
    saved = next((step.here / "workspace/train_mmdit").glob(f"*/checkpoints/step-{int(told[1]):08d}/COMMIT.json"))
    assert json.loads(saved.read_bytes())["world_size"] == ranks
    process = step.start(1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output.decode()
    assert b"resumed after step " + told[1] in output
