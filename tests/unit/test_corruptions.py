"""Corruptions: a higher severity is farther from the original by a measure of its own, and equal keys give equal pictures."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from model_core.data.corruptions import AESTHETIC, MAX_SEVERITY, corrupt, score_of
from model_core.data.pixels import image_tensor
from model_core.data.portraits import random_portrait, render_portrait
from model_core.data.synthetic import render, training_scene
from model_core.evaluation.reconstruction import psnr
from model_core.recipe import Scenes


def pictures() -> list[Image.Image]:
    scenes = [render(training_scene(Scenes(), "corruption", index), 64, index) for index in range(6)]
    return scenes + [render_portrait(random_portrait(index), 64, {}, index) for index in range(4)]


def psnr_to(original: Image.Image, picture: Image.Image) -> float:
    return float(psnr(image_tensor(picture)[None], image_tensor(original)[None]))


@pytest.mark.parametrize("kind", AESTHETIC)
def test_each_severity_is_farther_from_the_original_than_the_one_before(kind: str) -> None:
    slack = 0.5 if kind == "jpeg" else 0.0  # dB; on single pictures a lower quality may happen to come nearer
    for index, original in enumerate(pictures()):
        values = [psnr_to(original, corrupt(original, kind, severity, index)) for severity in range(1, MAX_SEVERITY + 1)]
        assert all(before + slack >= after for before, after in pairwise(values)), values
    levels = np.random.default_rng(0).integers(40, 216, (16, 16, 3), dtype=np.uint8)
    soft = Image.fromarray(levels).resize((64, 64), Image.Resampling.BICUBIC)
    values = [psnr_to(soft, corrupt(soft, kind, severity, 0)) for severity in range(1, MAX_SEVERITY + 1)]
    assert all(before > after for before, after in pairwise(values)), values


def test_a_shift_moves_the_picture_by_a_whole_and_growing_number_of_pixels() -> None:
    original = pictures()[0]
    pixels, moved = np.asarray(original), []
    for severity in range(1, MAX_SEVERITY + 1):
        shifted = np.asarray(corrupt(original, "shift", severity))
        moved += [step for step in range(1, 33) if np.array_equal(np.roll(shifted, (-step, -step), axis=(0, 1)), pixels)][:1]
    assert moved == sorted(set(moved))
    assert len(moved) == MAX_SEVERITY


@pytest.mark.parametrize("kind", AESTHETIC)
def test_a_corruption_keeps_size_and_mode_and_depends_on_its_key_alone(kind: str) -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 80, 3), dtype=np.uint8))
    once, again = (corrupt(picture, kind, 2, "key") for _ in range(2))
    assert (once.size, once.mode) == ((80, 48), "RGB")
    assert once.tobytes() == again.tobytes() != picture.tobytes()


def test_severity_0_is_the_picture_itself_and_scores_fall_from_5_to_1() -> None:
    picture = Image.new("RGB", (8, 8), "red")
    assert corrupt(picture, "blur", 0).tobytes() == picture.tobytes()
    assert [score_of(severity) for severity in range(MAX_SEVERITY + 1)] == [5, 4, 3, 2, 1]


@pytest.mark.parametrize(("kind", "severity", "words"), [("mud", 1, "found corruption 'mud'"), ("blur", 5, "found severity 5; .* 0 to 4")])
def test_an_unknown_corruption_or_severity_is_refused(kind: str, severity: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        corrupt(Image.new("RGB", (8, 8)), kind, severity)
