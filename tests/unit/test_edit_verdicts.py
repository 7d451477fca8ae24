"""Edits are judged right when they are what was wanted, and wrong when nothing or too much has changed."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from model_core.data.edits import Edit
from model_core.data.synthetic import is_held_out, scene_from_dict
from model_core.evaluation.edits import change_outside, judge_edit, psnr_gain, scene_edits
from model_core.evaluation.judge import Judge
from model_core.recipe import Scenes

SCENES = Scenes()
OPERATIONS = ("attribute", "background", "multi_reference", "removal", "restoration", "style", "text")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(SCENES)


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    return scene_edits(28, OPERATIONS, SCENES, seed=0)


def test_operations_take_turns_and_sources_are_held_out(edits):
    assert [edit.notes["operation"] for edit in edits] == [OPERATIONS[index % len(OPERATIONS)] for index in range(28)]
    assert all(is_held_out(scene_from_dict(edit.notes["source"]), SCENES.held_out_share) for edit in edits)


def test_the_wanted_picture_succeeds_and_is_consistent(judge, edits):
    for edit in edits:
        verdict = judge_edit(edit, edit.target, judge.read(edit.target))
        assert verdict.success, edit.instruction
        assert verdict.consistency > 0.99, (edit.instruction, verdict)


def test_the_source_unchanged_fails_however_consistent(judge, edits):
    for edit in edits:
        verdict = judge_edit(edit, edit.references[0], judge.read(edit.references[0]))
        assert not verdict.success, edit.instruction


def test_another_picture_is_not_consistent(judge, edits):
    for edit in edits:
        blank = Image.new("RGB", edit.target.size, (90, 90, 90))
        assert judge_edit(edit, blank, judge.read(blank)).consistency < 0.6


def test_psnr_gain_is_the_ratio_of_errors_in_decibels():
    target, near, far = (Image.new("RGB", (8, 8), (level, level, level)) for level in (100, 102, 120))
    assert psnr_gain(near, source=far, target=target) == pytest.approx(20.0)
    assert psnr_gain(far, source=near, target=target) == pytest.approx(-20.0)


def test_change_outside_looks_only_where_nothing_was_to_change():
    source = np.full((10, 10, 3), 50, dtype=np.uint8)
    target, result = source.copy(), source.copy()
    target[:5] = 200
    result[:5] = 0  # wrong, but inside the edited region
    result[5:] = 101
    pictures = [Image.fromarray(pixels) for pixels in (result, source, target)]
    assert change_outside(pictures[0], source=pictures[1], target=pictures[2]) == pytest.approx(51 / 255)
    assert change_outside(pictures[0], source=pictures[1], target=Image.new("RGB", (10, 10), (255, 255, 255))) is None
