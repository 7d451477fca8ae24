"""Who may import whom: pipelines -> components -> model_core, and what must not be paid for at import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("pipelines", "components", "model_core")
PLATFORM = {"kfp", "kfp_server_api", "kubernetes", "torchx"}
LIGHT = (  # what steps that need no tensors import; torch costs seconds
    "model_core/documents.py",
    "model_core/recipe.py",
    "model_core/site.py",
    "model_core/manifest.py",
    "model_core/workspace.py",
    "model_core/context.py",
    "model_core/run_record.py",
    "model_core/__main__.py",
    "model_core/task.py",
    "model_core/storage",
    "model_core/tracking",
    "model_core/steps/registry.py",
    "model_core/rewards",
    *(f"model_core/data/{name}.py" for name in ("sources", "synthetic", "edits", "filters", "captions", "shards")),
)


def files(*places: str) -> list[Path]:
    found = [path for place in places for path in ([ROOT / place] if (ROOT / place).is_file() else sorted((ROOT / place).rglob("*.py")))]
    assert found, f"nothing at {places}"
    return found


def imports(path: Path, *, at_module_level: bool = False) -> Iterator[tuple[str, int]]:
    """Absolute module names that a file imports, with line numbers; `if TYPE_CHECKING` blocks are left out."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield node.module or "", node.lineno
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
        elif not (at_module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            pending += ast.iter_child_nodes(node)


def offenders(paths: list[Path], forbidden: set[str], *, at_module_level: bool = False) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in paths
        for name, line in imports(path, at_module_level=at_module_level)
        if name.partition(".")[0] in forbidden
    ]


def test_model_core_knows_no_platform_and_no_layer_above_it() -> None:
    assert offenders(files("model_core"), PLATFORM | {"components", "pipelines"}) == []


def test_components_know_no_pipelines() -> None:
    assert offenders(files("components"), {"pipelines"}) == []


def test_components_import_the_standard_library_and_kfp_alone_at_module_level() -> None:
    allowed = sys.stdlib_module_names | {"kfp", "components"}
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files("components")
        for name, line in imports(path, at_module_level=True)
        if name.partition(".")[0] not in allowed
    ]
    assert found == []


def test_the_launcher_needs_no_kfp() -> None:
    assert offenders(files("components/launch"), {"kfp"}) == []


def test_pipelines_import_no_torch_at_module_level() -> None:
    assert offenders(files("pipelines"), {"torch", "transformers", "diffusers"}, at_module_level=True) == []


def test_mlflow_is_imported_by_tracking_alone_and_late() -> None:
    others = [path for path in files(*LAYERS) if path.parent != ROOT / "model_core" / "tracking"]
    assert offenders(others, {"mlflow"}) == []
    assert offenders(files("model_core/tracking"), {"mlflow"}, at_module_level=True) == []


@pytest.mark.parametrize("place", LIGHT)
def test_light_modules_import_no_torch_at_module_level(place: str) -> None:
    assert offenders(files(place), {"torch", "torchvision", "transformers", "diffusers"}, at_module_level=True) == []


def test_rewards_never_ask_the_judge() -> None:
    """Neither by name nor through what they import: what evaluates a model must not train it."""
    places = files("model_core/rewards")
    named = [f"{path.name} imports {name}" for path in places for name, _ in imports(path) if name.startswith("model_core.evaluation")]
    assert named == []
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in places]
    code = f"import sys, {', '.join(modules)}; print([name for name in sys.modules if name.startswith('model_core.evaluation')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def loaded_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("pipelines.cli", {"torch", "mlflow", "kfp", "transformers"}),
        ("model_core.__main__", {"torch", "mlflow", "kfp", "transformers"}),
        ("components.launch", {"torch", "mlflow", "kfp", "pydantic"}),
        ("model_core.rewards.service", {"torch", "mlflow", "kfp", "transformers"}),
        ("pipelines.training", {"torch", "mlflow"}),
    ],
)
def test_entry_points_start_without_heavy_packages(module: str, heavy: set[str]) -> None:
    assert loaded_by(module) & heavy == set()


def test_each_step_has_a_module_a_component_and_a_place_in_the_dag() -> None:
    from model_core.steps.registry import STEPS
    from pipelines.plan import training_tasks
    from pipelines.training import Sections

    assert {path.stem for path in files("model_core/steps")} - {"__init__", "registry"} == set(STEPS)
    assert {path.stem for path in (ROOT / "components").glob("*.py")} - {"__init__"} == set(STEPS)
    assert {task.step for task in training_tasks(["S1"], Sections(True, True, True, True))} == set(STEPS)
