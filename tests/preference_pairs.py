"""A result of build_preferences by hand: pairs that wait for people, for pictures from text and for edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from model_core.data.preferences import FILE_NAME, Preference, png, write_preferences
from model_core.data.synthetic import BACKGROUNDS, COLORS, SHAPES, Scene, describe, render
from model_core.manifest import Code
from model_core.recipe import Dimension
from model_core.run_record import RunRecord, StepRecord, write_run, write_step
from model_core.site import Site
from model_core.steps.registry import STEPS
from model_core.workspace import Address, StepResult, Workspace
from pipelines.documents import find_recipe

STEP = "build_preferences"
KEY = "0123456789abcdef"


def scene(index: int) -> Scene:
    """A scene that differs from its neighbours."""
    color, shape = list(COLORS)[index % len(COLORS)], SHAPES[index % len(SHAPES)]
    return Scene(color, shape, ("left", "top")[index % 2], list(BACKGROUNDS)[index % len(BACKGROUNDS)], f"{'ABC'[index % 3]}{index % 10}")


def waiting_pair(index: int, *, dimension: Dimension = "alignment", size_px: int = 64) -> Preference:
    """Pair `index`: the picture that was asked for is a, one of another shape is b."""
    right = scene(index)
    wrong = replace(right, shape=SHAPES[(SHAPES.index(right.shape) + 1) % len(SHAPES)])
    return Preference(
        pair_id=f"pair-{index:03}",
        dimension=dimension,
        prompt_id=f"prompt-{index:03}",
        prompt=describe(right, index),
        category="scene",
        image_a=png(render(right, size_px, "a", index)),
        image_b=png(render(wrong, size_px, "b", index)),
        label="unlabelled",
        reason="sampled",
        split="train",
    )


def waiting_edit(index: int, *, dimension: Dimension = "instruction_following", size_px: int = 64, num_sources: int = 1) -> Preference:
    """An edit whose source is a recoloured: a did what was asked, b is the source unchanged."""
    target = scene(index)
    source = replace(target, color=list(COLORS)[(index + 1) % len(COLORS)])
    pair = waiting_pair(index, dimension=dimension, size_px=size_px)
    sources = [png(render(source, size_px, "source", index, number)) for number in range(num_sources)]
    return replace(pair, prompt=f"Make the {source.shape} {target.color}.", category="edit", image_b=sources[0], sources=sources)


def commit_preferences(site: Site, pairs: Sequence[Preference], *, run: str = "r") -> Path:
    """Leaves the pairs as the result of `run`; returns its folder."""
    recipe, workspace, address = find_recipe("smoke"), Workspace(site), Address(STEP, None, KEY)
    result = StepResult(stats={}, code=Code(version="0", git_sha=None, image_digest=None))
    write_run(workspace.storage, RunRecord(run, recipe.model_dump(mode="json"), recipe.digest(), "2026-11-21T09:30:00+00:00"))
    with workspace.attempt(address, "0") as folder:
        write_preferences(folder / FILE_NAME, pairs)
        manifest = workspace.commit(address, folder, spec=STEPS[STEP], recipe=recipe, inputs={}, result=result, confirm=lambda: None)
        place = folder.parent
    record = StepRecord(STEP, None, KEY, "done", 1.0, reused=False, uri=manifest.uri, started_at="2026-11-21T09:30:00+00:00")
    write_step(workspace.storage, run, record)
    return place
