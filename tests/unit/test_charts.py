"""Charts: ticks are round and enclose the data; what is drawn stays inside the frame."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from model_core.evaluation.charts import HEIGHT, WIDTH, line_chart, nice_ticks, running_mean


@pytest.mark.parametrize(("low", "high"), [(0.031, 1.7), (0.5, 0.5), (-3.0, 40_000.0), (1e-7, 3e-7), (0.0, 0.0)])
def test_ticks_are_evenly_apart_and_enclose_the_values(low, high):
    ticks = nice_ticks(low, high)
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 7
    assert all(step == pytest.approx(steps[0]) for step in steps)


def test_running_mean_keeps_straight_lines_and_their_ends():
    assert running_mean([0.0, 1.0, 2.0, 3.0, 4.0], 2) == pytest.approx([0.0, 1.0, 2.0, 3.0, 4.0])


def test_a_chart_is_well_formed_and_inside_its_frame():
    points = [(float(step), math.exp(-step / 50) + 0.1 * (step % 2)) for step in range(1, 100)]
    svg = line_chart([*points, (100.0, math.nan)], label="loss")
    ElementTree.fromstring(svg)
    for path in re.findall(r' d="M([^"]+)"', svg):
        for place in path.split("L"):
            x, y = (float(part) for part in place.split())
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT


def test_nothing_to_draw_gives_nothing():
    assert line_chart([(1.0, math.nan)], label="loss") == ""
