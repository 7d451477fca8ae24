"""CONTRIBUTING's page on adding a step, followed word for word in a copy of the project."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEIGHBOUR, STEP = "render_text", "count_licences"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("model_core", "components", "pipelines", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def insert(path: Path, *, before: str, text: str) -> None:
    content = path.read_text()
    assert before in content, f"{path}: nothing to insert before"
    path.write_text(content.replace(before, text + before, 1))


def follow(copy: Path) -> None:
    blocks = re.findall(r"   ```python\n(.*?)   ```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    spec, step = (textwrap.dedent(block) for block in blocks)
    line = re.search(r"such as\s+`(step\(.*?\))`", (ROOT / "CONTRIBUTING.md").read_text())
    assert line is not None
    insert(copy / "model_core/steps/registry.py", before=f'        StepSpec(name="{NEIGHBOUR}"', text=textwrap.indent(spec, 8 * " "))
    (copy / f"model_core/steps/{STEP}.py").write_text(step)
    (copy / f"components/{STEP}.py").write_text((copy / f"components/{NEIGHBOUR}.py").read_text().replace(NEIGHBOUR, STEP))
    dag = copy / "pipelines/training.py"
    insert(dag, before="from components.encode_latents", text=f"from components.{STEP} import {STEP}\n")
    insert(dag, before="        text_images = step(", text=f"        {line[1]}\n")


def python(copy: Path, *arguments: str, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *arguments], cwd=copy, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_added_step_is_found_by_the_tests_and_runs(copy: Path) -> None:
    follow(copy)
    python(copy, "-m", "pytest", "-q", "tests/unit/test_compile.py", DARKROOM_REFRESH_GOLDEN="1")
    python(copy, "-m", "pytest", "-q", "tests/unit/test_compile.py", "tests/unit/test_components.py", "tests/unit/test_layers.py")
    (copy / "site.yaml").write_text("workspace: ./workspace\n")
    common = ("--recipe", "pipelines/recipes/smoke.yaml", "--site", "site.yaml", "--run", "r")
    python(copy, "-m", "model_core", "ingest_images", *common, "--output", "images.json")
    assert "done in" in python(copy, "-m", "model_core", STEP, *common, "--input", "images=images.json", "--output", "counts.json")
    (result,) = (copy / "workspace" / STEP).glob("*/licences.json")
    assert json.loads(result.read_text())
