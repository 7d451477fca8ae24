"""Drawn portraits: captions that tell them apart, faults that grow, and pairs in which the worse has all faults of the lesser."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from PIL import Image

from model_core.data.corruptions import rms_difference
from model_core.data.portraits import (
    BACKGROUNDS,
    FAULTS,
    HAIRS,
    NUM_WORDINGS,
    SHIRTS,
    STYLES,
    Portrait,
    describe_portrait,
    fault_pairs,
    random_portrait,
    render_portrait,
)

GRADED = [name for name, (_, severities) in FAULTS.items() if len(severities) > 1]


def test_every_wording_names_all_that_tells_portraits_apart() -> None:
    people = [Portrait(*fields, "tan") for fields in product(HAIRS, STYLES, SHIRTS, BACKGROUNDS)]
    for wording in range(NUM_WORDINGS):
        assert len({describe_portrait(person, wording) for person in people}) == len(people)


def test_the_background_and_the_hair_are_of_the_colours_that_the_caption_names() -> None:
    for index in range(8):
        portrait = random_portrait("colours", index)
        pixels = np.asarray(render_portrait(portrait, 64, {}, index))
        assert tuple(pixels[0, 0]) == BACKGROUNDS[portrait.background]
        assert (np.abs(pixels.astype(int) - HAIRS[portrait.hair]).max(axis=2) < 3).sum() > 60


def spread(one: Image.Image, other: Image.Image) -> float:
    """Pixels of width and height over which two pictures differ: how far a part has moved, when it is gone from where it was."""
    rows, columns = np.nonzero((np.asarray(one) != np.asarray(other)).any(axis=2))
    return float(np.ptp(rows) + np.ptp(columns))


@pytest.mark.parametrize("name", GRADED)
def test_a_graver_fault_moves_more_of_the_face_or_moves_it_farther(name: str) -> None:
    measure = spread if name in ("uneven_eyes", "displaced_mouth") else rms_difference
    distances = []
    for index in range(8):
        portrait = random_portrait(index)
        intact = render_portrait(portrait, 64, {}, index)
        distances.append([measure(intact, render_portrait(portrait, 64, {name: severity}, index)) for severity in FAULTS[name][1]])
    assert (np.diff(distances) >= 0).all()
    assert (np.diff(np.mean(distances, axis=0)) > 0).all()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_changes_the_face_and_nothing_near_the_corners(name: str) -> None:
    portrait = random_portrait("corner")
    intact, faulty = (np.asarray(render_portrait(portrait, 64, faults, 1)) for faults in ({}, {name: FAULTS[name][1][-1]}))
    changed = (intact != faulty).any(axis=2)
    assert changed[16:52, 16:56].any()
    assert not changed[:8].any()
    assert not changed[60:].any()


def test_the_worse_of_a_pair_has_every_fault_of_the_lesser_and_a_greater_sum_up_to_4() -> None:
    pairs = fault_pairs()
    assert {name for _, worse in pairs for name in worse} == set(FAULTS)
    for lesser, worse in pairs:
        assert all(worse.get(name, 0) >= severity for name, severity in lesser.items())
        assert sum(lesser.values()) < sum(worse.values()) <= 4
        features = [FAULTS[name][0] for name in worse]
        assert len(set(features)) == len(features)


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found fault third_eye of severity 1; allowed are .*third_eye \[3\]"):
        render_portrait(random_portrait(0), 64, {"third_eye": 1})
