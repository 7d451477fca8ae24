"""Degradation of captions: what is left out or blurred is recorded, can be reversed, and never touches the text to draw."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest

from model_core.data.captions import QUOTED
from model_core.data.degradation import (
    APPLICABLE,
    ATTRIBUTES,
    OPPOSITE,
    Degraded,
    Step,
    attributes_in,
    degrade,
    inferable,
    left_open,
    prompt_class,
    read_scene,
    thoughts,
)
from model_core.data.degradation_words import BLURS
from model_core.data.edits import REPAIR_WORDINGS, STYLES, change_wordings, reference_wordings, style_wordings
from model_core.data.instruction_summaries import summarise
from model_core.data.keys import keyed_generator
from model_core.data.synthetic import BACKGROUNDS, COLORS, PHOTO, POSITIONS, SHAPES, TEXT_CENTERS, Scene, describe
from model_core.recipe_enhancer import DEGRADATIONS

ALL = dict.fromkeys(DEGRADATIONS, 1.0)
HALF = dict.fromkeys(DEGRADATIONS, 0.5)
SCENES = [Scene(*values) for values in product(COLORS, SHAPES, POSITIONS, (*BACKGROUNDS, PHOTO), ("K7", ""))]
FINE = (
    'a wooden boat on a calm lake, with soft golden light, rough brushstrokes, a red flag on the left, the sign "OPEN" above it, '
    "against a dark background, in the style of Turner"
)


def test_every_vague_word_stands_for_one_value_and_is_none_itself():
    words = [word for blurs in BLURS.values() for told in blurs.values() for word in told]
    assert len(words) == len(set(words))
    values = {value for values in ATTRIBUTES.values() for value in values}
    assert not values & {part for word in words for part in re.findall(r"\w+", word)}
    assert {aspect: set(blurs) for aspect, blurs in BLURS.items()} == {aspect: set(values) for aspect, values in ATTRIBUTES.items()}


@pytest.mark.parametrize("wording", [1, 2])
def test_captions_that_name_everything_are_read_back(wording: int):
    assert all(read_scene(describe(scene, wording)) == (scene, wording) for scene in SCENES)


@pytest.mark.parametrize("caption", ["a red circle on the left with the text K7", "a red dog on the left of a white background", FINE])
def test_other_captions_are_no_scenes(caption: str):
    assert read_scene(caption) is None


def test_the_request_names_what_no_step_took_and_nothing_that_one_did():
    for number, scene in enumerate(SCENES):
        degraded = degrade(describe(scene, 1 + number % 2), HALF, keyed_generator(number))
        taken = {step.aspect for step in degraded.steps}
        # Where the text tells the place, the word for its own place stands in the request.
        place = {"position": OPPOSITE[scene.position]} if inferable(degraded).get("position") and "text on" in str(degraded.steps) else {}
        kept = {name: getattr(scene, name) for name in ATTRIBUTES if name not in taken and getattr(scene, name) != PHOTO}
        assert attributes_in(degraded.short) == kept | place
        assert QUOTED.findall(degraded.short) == ([scene.text] if scene.text else [])


def test_what_can_be_inferred_has_one_meaning_and_what_is_open_has_left_no_word():
    """Requests that are equal have the same meaning where they are inferable."""
    meanings: dict[str, list[dict[str, str]]] = {}
    for number, scene in enumerate(SCENES):
        degraded = degrade(describe(scene, 1), ALL | {"colloquial": 0.0}, keyed_generator(number))
        told, opened = inferable(degraded), left_open(degraded)
        assert all(getattr(scene, name) == value for name, value in told.items())
        assert set(told) | set(opened) == set(ATTRIBUTES)
        assert set(opened) <= {"position", "background"}
        meanings.setdefault(degraded.short, []).append(told)
    assert all(found == told[0] for told in meanings.values() for found in told)
    assert any(len(told) > 1 for told in meanings.values())


def test_the_text_stands_opposite_the_shape():
    for position, opposite in OPPOSITE.items():
        x, y = np.mean(TEXT_CENTERS[position], axis=0)
        assert {"left": x < 0.5, "right": x > 0.5, "top": y < 0.5, "bottom": y > 0.5}[opposite]


def test_clauses_of_each_aspect_go_and_quoted_text_and_subject_stay():
    degraded = degrade(FINE, ALL, keyed_generator(3))
    assert {step.operation for step in degraded.steps} == {"style", "lighting", "layout", "background", "subject", "colloquial"}
    assert '"OPEN"' in degraded.short
    assert "a wooden boat" in degraded.short
    for step in degraded.steps:
        assert step.fine in FINE
        assert not step.fine or step.fine not in degraded.short
        assert step.short in degraded.short or step.operation == "colloquial"


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a boat on a lake", "general"),
        ("a young woman with a hat", "portrait"),
        ('a woman below the sign "OPEN"', "text"),
        ("a red circle on the left of a white background with the text K7", "text"),
        ('a poster with “one” and "two"', "complex_text"),
        (f'a page with "{"word " * 10}"', "complex_text"),
    ],
)
def test_the_class_of_a_caption(caption: str, expected: str):
    assert prompt_class(caption) == expected
    taken = {step.operation for step in degrade(caption, ALL, keyed_generator(0)).steps}
    assert taken <= set(APPLICABLE[expected])  # type: ignore[index]


def test_texture_of_a_picture_with_text_is_left_as_it_is():
    assert "rough brushstrokes" in degrade(FINE, ALL, keyed_generator(0)).short


def test_other_languages_and_rates_of_zero_change_nothing():
    assert degrade("一只红色的猫，柔和的光线", ALL, keyed_generator(0)) == Degraded("一只红色的猫，柔和的光线", ())
    assert degrade(FINE, {}, keyed_generator(0)) == Degraded(FINE, ())


def test_the_same_key_gives_the_same_request_and_another_one_another():
    texts = {degrade(FINE, HALF, keyed_generator(number)).short for number in range(20)}
    assert degrade(FINE, HALF, keyed_generator(1)) == degrade(FINE, HALF, keyed_generator(1))
    assert len(texts) > 5


def test_an_operation_is_taken_as_often_as_its_rate_says():
    rates = {"subject": 0.2, "background": 0.7}
    found = [step.aspect for number in range(2000) for step in degrade(describe(SCENES[0], 1), rates, keyed_generator(number)).steps]
    assert found.count("color") / 2000 == pytest.approx(0.2, abs=0.04)
    assert found.count("background") / 2000 == pytest.approx(0.7, abs=0.04)
    assert "position" not in found


def test_thoughts_reverse_the_operations():
    steps = (Step("subject", "color", "red", "crimson"), Step("background", "background", "white", ""))
    assert thoughts(steps) == ["background: - -> white", "color: crimson -> red"]


def known_instructions() -> list[str]:
    scene, bare = Scene("red", "circle", "left", "white", "K7"), Scene("red", "circle", "left", "white", "")
    changed = [("color", "blue"), ("shape", "star"), ("background", "pink"), ("text", ""), ("text", "B3")]
    found = [wording for attribute, value in changed for wording in change_wordings(scene, attribute, value)]
    found += change_wordings(bare, "text", "B3")
    found += [wording for attribute in ("color", "shape", "background", "text") for wording in reference_wordings(attribute)]
    return (
        found + [wording for style in STYLES for wording in style_wordings(style)] + [w for pair in REPAIR_WORDINGS.values() for w in pair]
    )


def test_every_instruction_of_the_edits_can_be_told_from_its_summary():
    meanings: dict[str, set[str]] = {}
    for instruction in known_instructions():
        for number in range(8):
            short, step = summarise(instruction, keyed_generator(number))
            assert step.fine != "full sentence"
            assert len(short) < len(instruction)
            assert re.findall(r"\b[A-Z]\d\b", instruction) == QUOTED.findall(short)
            meanings.setdefault(short, set()).add(instruction)
    assert all(len(told) == 1 for told in meanings.values())


def test_any_other_instruction_loses_its_fillers_but_no_quoted_text():
    short, _ = summarise('please replace the sign with "the Open" in a nice font', keyed_generator(0))
    assert short == 'replace sign with "the Open" in nice font'
