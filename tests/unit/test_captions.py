"""Captions: true to what is known, parseable, and in the language they say."""

import json

import pytest
from PIL import Image

from model_core.data.captions import Captions, captions_of, check_captions, language_of
from model_core.data.shards import RawRow, make_row
from model_core.data.synthetic import Scene

SCENE = Scene("red", "circle", "left", "gray", "A7")
PICTURE = Image.new("RGB", (16, 16))


def of(caption: str, *, kind: str = "image", notes: object = None, **known: str) -> Captions:
    row: RawRow = make_row(PICTURE, kind=kind, caption=caption, annotation=json.dumps(notes or {}), **known)
    captions = captions_of(row, max_words=50)
    check_captions(captions)
    return captions


def test_a_scene_keeps_its_wording_and_tells_its_text_and_facts():
    captions = of("a red circle on the left with the text A7", notes=SCENE.to_dict())
    assert captions.general == "a red circle on the left with the text A7"
    assert captions.text == 'the text "A7" beside a red circle on the left'
    assert captions.knowledge.startswith(captions.general)
    assert json.loads(captions.structured) == {
        "objects": [{"color": "red", "shape": "circle", "position": "left"}],
        "background": "gray",
        "text": "A7",
    }


def test_a_scene_without_text_has_no_text_caption():
    assert of("a red circle on the left", notes=SCENE.to_dict() | {"text": ""}).text == ""


def test_an_edit_is_described_by_its_target():
    target = SCENE.to_dict() | {"color": "blue"}
    notes = {"source": SCENE.to_dict(), "target": target, "change": {"attribute": "color", "from": "red", "to": "blue", "region": "shape"}}
    captions = of("a blue circle on the left with the text A7", kind="edit", notes=notes, instruction="make the circle blue")
    assert json.loads(captions.structured)["objects"][0]["color"] == "blue"
    assert "red" not in captions.general + captions.text + captions.structured
    assert captions.knowledge.endswith("after the edit: make the circle blue")


def test_a_black_and_white_target_claims_no_colour():
    notes = {"source": SCENE.to_dict(), "target": SCENE.to_dict(), "change": {"attribute": "style", "to": "black and white"}}
    captions = of("a black and white picture of a circle on the left with the text A7", kind="edit", notes=notes, instruction="make it so")
    assert json.loads(captions.structured)["style"] == "black and white"
    assert "red" not in captions.text + captions.structured


def test_a_text_image_is_transcribed_word_for_word():
    notes = {"mode": "template", "layout": "slide", "text": ["Tea", "你好"], "text_color": "red", "background": "white", "language": "zh"}
    captions = of('a slide with the title "Tea" and "你好"', kind="text_image", notes=notes)
    assert captions.text == 'the text "Tea" and "你好"'
    assert json.loads(captions.structured)["text"] == ["Tea", "你好"]


def test_a_users_photograph_keeps_its_caption_and_tells_where_it_comes_from():
    captions = of('a shop sign that says "OPEN" and “早安”', provenance="photos/street/1.jpg")
    assert captions.text == 'the text "OPEN" and "早安"'
    assert captions.knowledge.endswith("from the collection street")
    assert json.loads(captions.structured) == {"description": captions.general, "text": ["OPEN", "早安"]}
    assert of("a cat", provenance="photos/1.jpg").text == ""


def test_long_captions_are_cut():
    assert len(of("word " * 500).general.split()) == 50


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("a red circle", "en"),
        ("红色背景上的文字“你好”", "zh"),
        ("赤い丸と星", "ja"),
        ("빨간 원", "ko"),
        ("красный круг", "ru"),
        ("12 + 3", "und"),
        ('a sign with the text "你好"', "en"),
    ],
)
def test_the_language_is_told_by_the_script(text, language):
    assert language_of(text) == language


@pytest.mark.parametrize(
    "broken",
    [{"general": ""}, {"text": "a\nb"}, {"structured": "[1]"}, {"structured": "{"}, {"knowledge": ""}],
    ids=lambda broken: str(broken),
)
def test_captions_that_break_the_schema_are_found(broken):
    whole = {"general": "a", "text": "", "knowledge": "a", "structured": "{}", "language": "en"}
    with pytest.raises(ValueError, match=r"."):
        check_captions(Captions(**{**whole, **broken}))
