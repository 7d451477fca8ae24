"""Rewards by rules around texts, faces and what an edit leaves alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model_core.data.edits import edit_scene
from model_core.data.keys import keyed_generator
from model_core.data.synthetic import (
    Scene,
    describe,
)
from model_core.documents import UserError
from model_core.recipe import Scenes
from model_core.rewards.edit_consistency import INSTRUCTION, NO_REGION, EditConsistency, outside_region, similarity
from model_core.rewards.edit_consistency import NAME as CONSISTENCY
from model_core.rewards.face_gate import DRAWN_FACE, NO_FACE, FaceGated, face_gate, open_face_finder
from model_core.rewards.text_accuracy import NO_TEXT, TextAccuracy, asked_text, levenshtein, open_reader, symmetric_cer
from model_core.rewards.verdict import Invalid, Score, ScoreRequest, Value
from tests.scoring import BLANK, Fixed, request, value

SCENES = Scenes()


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2), ("same", "same", 0)],
)
def test_levenshtein_of_known_pairs(first: str, second: str, distance: int) -> None:
    assert levenshtein(first, second) == levenshtein(second, first) == distance


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_levenshtein_agrees_with_its_recursive_definition(first: str, second: str) -> None:
    def recursive(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        if a[0] == b[0]:
            return recursive(a[1:], b[1:])
        return 1 + min(recursive(a[1:], b), recursive(a, b[1:]), recursive(a[1:], b[1:]))

    assert levenshtein(first, second) == recursive(first, second)


@pytest.mark.parametrize(
    ("read", "asked", "accuracy"),
    [
        ("Hello World", "hello  world", 1.0),
        ("", "A1", 0.0),
        ("A1A1", "A1", 0.5),  # repeated
        ("A1 and more of it", "A1", 2 / 13),  # the text is there, with other text
        ("A", "A1", 0.5),
        ("XYZW", "A1", 0.0),
    ],
)
def test_text_that_is_missing_repeated_or_added_costs(read: str, asked: str, accuracy: float) -> None:
    assert 1 - symmetric_cer(read, asked) == pytest.approx(accuracy)
    (scores,) = TextAccuracy(lambda _picture: read).score([request(prompt=f'a sign that says "{asked}"')])
    assert value(scores["text_accuracy"]) == pytest.approx(accuracy)


def test_the_asked_text_is_the_scenes_the_edits_or_the_quoted_one() -> None:
    scene = Scene("red", "circle", "left", "white", "K7")
    assert asked_text(request(prompt=describe(scene, 1), notes=scene.to_dict())) == "K7"
    assert asked_text(request(prompt="a red circle", notes=scene.to_dict())) == ""
    assert asked_text(request(prompt='“Open” above "late"')) == "Open late"
    change = {"attribute": "text", "from": "K7", "to": "B2", "region": "text"}
    assert asked_text(request(prompt="change the text to B2", notes={"change": change})) == "B2"


def test_text_is_invalid_and_not_read_where_none_is_asked_for() -> None:
    def read(_picture: Image.Image) -> str:
        raise AssertionError("was read")

    assert TextAccuracy(read).score([request(prompt="a red circle")]) == [{"text_accuracy": NO_TEXT}]


@pytest.mark.parametrize(
    ("module", "open_it", "package"),
    [("text_accuracy", open_reader, "rapidocr-onnxruntime"), ("face_gate", open_face_finder, "nudenet")],
)
def test_a_package_that_is_not_installed_is_named(module: str, open_it: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"model_core.rewards.{module}.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=f"install it with `uv pip install {package}`"):
        open_it()


@pytest.mark.parametrize(
    ("score", "has_face", "after"),
    [
        (Value(4.0), True, Value(4.0)),
        (Value(4.0), False, NO_FACE),
        (Invalid("torn"), False, Invalid("torn")),
        (Invalid("torn"), True, Invalid("torn")),
    ],
)
def test_a_portrait_is_valid_only_with_a_face(score: Score, has_face: bool, after: Score) -> None:
    assert face_gate(score, has_face=has_face) == after
    gated = FaceGated(Fixed(portrait=score, aesthetics=Value(1.0)), has_face=lambda _picture: has_face)
    assert gated.score([request()]) == [{"portrait": after, "aesthetics": Value(1.0)}]


def test_a_drawn_face_is_taken_from_the_notes() -> None:
    gated = FaceGated(Fixed(portrait=Value(4.0)), has_face=lambda _picture: False)
    assert gated.score([request(notes={DRAWN_FACE: True})]) == [{"portrait": Value(4.0)}]


def edit_request(operation: str, index: int = 5) -> tuple[ScoreRequest, Image.Image]:
    """An edit, asked about with its source as the result; and its target."""
    edit = edit_scene(operation, Scene("red", "circle", "left", "white", "K7"), SCENES, keyed_generator(index), index)
    assert edit is not None
    return request(edit.references[0], edit.instruction, sources=edit.references, notes=edit.notes), edit.target


@pytest.mark.parametrize("operation", ["attribute", "background", "text", "removal"])
@pytest.mark.parametrize("index", range(4))
def test_the_outside_of_an_edit_is_where_source_and_target_are_equal(operation: str, index: int) -> None:
    asked, target = edit_request(operation, index)
    outside = outside_region(asked.notes, size=target.size)
    assert outside is not None
    assert np.abs(np.asarray(target, dtype=int) - np.asarray(asked.sources[0], dtype=int))[outside].max() == 0
    assert outside.mean() > (0.04 if asked.notes["change"]["region"] == "background" else 0.6)


def test_doing_nothing_does_not_win_an_edit() -> None:
    asked, target = edit_request("attribute")
    followed, ignored = EditConsistency(Fixed(**{INSTRUCTION: Value(1.0)})), Fixed(**{INSTRUCTION: Value(0.0)})
    done = followed.score([replace(asked, image=target)])[0][CONSISTENCY]
    nothing = EditConsistency(ignored).score([asked])[0][CONSISTENCY]
    assert done == Value(1.0)
    assert nothing == Value(0.0)


def test_damage_outside_the_edited_region_lowers_consistency_and_damage_inside_does_not() -> None:
    asked, target = edit_request("text")
    scorer = EditConsistency(Fixed(**{INSTRUCTION: Value(0.5)}))

    def consistency(pixels: np.ndarray) -> float:
        return value(scorer.score([replace(asked, image=Image.fromarray(pixels))])[0][CONSISTENCY])

    outside = outside_region(asked.notes, size=target.size)
    assert outside is not None
    inside_spoilt, outside_spoilt = np.array(target), np.array(target)
    inside_spoilt[~outside] = 0
    outside_spoilt[outside] = 128
    assert consistency(np.array(target)) == consistency(inside_spoilt) == 0.5
    assert consistency(outside_spoilt) < 0.1


def test_similarity_falls_by_e_at_sixteen_levels() -> None:
    source, result = Image.new("RGB", (8, 8), (100, 100, 100)), Image.new("RGB", (16, 16), (116, 84, 116))
    assert similarity(result, source, np.ones((8, 8), dtype=bool)) == pytest.approx(np.exp(-1))


@pytest.mark.parametrize("notes", [{}, {"change": {"attribute": "style", "to": "sepia", "region": "all"}, "source": None, "target": None}])
def test_consistency_is_invalid_where_the_region_is_unknown(notes: dict[str, Any]) -> None:
    scorer = EditConsistency(Fixed(**{INSTRUCTION: Value(1.0)}))
    assert scorer.score([request(sources=[BLANK], notes=notes)])[0][CONSISTENCY] == NO_REGION


def test_consistency_is_invalid_where_the_instructions_score_is() -> None:
    scorer = EditConsistency(Fixed(**{INSTRUCTION: Invalid("torn")}))
    assert scorer.score([edit_request("text")[0]])[0][CONSISTENCY] == Invalid("instruction_following: torn")
