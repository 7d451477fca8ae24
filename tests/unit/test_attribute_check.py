"""The rule that checks what a prompt asks of a scene, against pictures whose content is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from model_core.data.edits import edit_scene
from model_core.data.keys import keyed_generator
from model_core.data.synthetic import (
    BACKGROUNDS,
    COLORS,
    NUM_WORDINGS,
    PHOTO,
    POSITIONS,
    SHAPES,
    Scene,
    asked_in,
    compose,
    describe,
    held_out_scenes,
    render,
)
from model_core.recipe import Scenes
from model_core.rewards.attribute_check import ATTRIBUTES, COLOR_TEMPERATURE, MEAN, AttributeCheck, palette_share
from model_core.rewards.verdict import Invalid, ScoreRequest, Value
from tests.scoring import request, value

SCENES = Scenes()
TEXTS = [letter + digit for letter in SCENES.letters for digit in SCENES.digits]
VALUES: dict[str, Sequence[str]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "position": POSITIONS,
    "text": TEXTS,
    "background": tuple(BACKGROUNDS),
}
EVERYTHING_ASKED = 1  # the wording that names the background too


def of_scene(scene: Scene, image: Image.Image, wording: int = EVERYTHING_ASKED) -> ScoreRequest:
    return request(image, describe(scene, wording), notes=scene.to_dict())


def drawn(scene: Scene, index: int) -> Image.Image:
    return render(scene, 64, 7, "rule rewards", index)


def wrong_in(scene: Scene, attribute: str, index: int) -> Scene:
    others = [value for value in VALUES[attribute] if value != getattr(scene, attribute)]
    return replace(scene, **{attribute: others[index % len(others)]})


SOME_SCENES = held_out_scenes(24, SCENES, seed=3)
CHECK = AttributeCheck(SCENES)


def test_clean_renders_score_high_in_all_that_is_asked() -> None:
    scores = CHECK.score([of_scene(scene, drawn(scene, index)) for index, scene in enumerate(SOME_SCENES)])
    for name in CHECK.names:
        values = [value(score[name]) for score in scores]
        assert min(values) > 0.4, name
        assert np.mean(values) > 0.85, name


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_wrong_attribute_scores_low_in_itself(attribute: str) -> None:
    right, wrong = [], []
    for index, scene in enumerate(SOME_SCENES):
        pictures = drawn(scene, index), drawn(wrong_in(scene, attribute, index), index)
        first, second = CHECK.score([of_scene(scene, picture) for picture in pictures])
        right.append(value(first[f"check_{attribute}"]))
        wrong.append(value(second[f"check_{attribute}"]))
        assert value(second[MEAN]) < value(first[MEAN])
    # one character of a wrong text may be the right one
    assert max(wrong) < (0.55 if attribute == "text" else 0.15)
    assert min(right) > max(wrong)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_each_step_from_a_wrong_to_the_right_picture_raises_the_reward(attribute: str) -> None:
    for index, scene in enumerate(SOME_SCENES[:8]):
        wrong, right = (np.asarray(drawn(shown, index), dtype=float) for shown in (wrong_in(scene, attribute, index), scene))
        blends = [Image.fromarray(((1 - share) * wrong + share * right).round().astype(np.uint8)) for share in np.linspace(0, 1, 17)]
        values = [value(scores[f"check_{attribute}"]) for scores in CHECK.score([of_scene(scene, blend) for blend in blends])]
        steps = np.diff(values)
        assert steps.min() > -0.002, (scene, values)  # levels are whole numbers
        assert values[-1] > values[0] + 0.3


@given(
    start=st.tuples(*[st.floats(0, 255)] * 3),
    asked=st.sampled_from([*COLORS, *BACKGROUNDS]),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(max_examples=200, deadline=None)
def test_colour_is_monotone_on_every_straight_way_to_the_asked_one(
    start: tuple[float, float, float], asked: str, shares: tuple[float, float]
) -> None:
    goal = np.array((COLORS | BACKGROUNDS)[asked])
    first, second = (palette_share(np.array([(1 - share) * np.array(start) + share * goal]), asked) for share in sorted(shares))
    assert second >= first - 1e-9


def test_colour_share_is_the_softmax_of_distances() -> None:
    pixel = np.array([100.0, 120.0, 140.0])
    palette = COLORS | BACKGROUNDS
    likelihoods = {name: np.exp(-np.linalg.norm(pixel - color) / COLOR_TEMPERATURE) for name, color in palette.items()}
    assert palette_share(pixel[None], "blue") == pytest.approx(likelihoods["blue"] / sum(likelihoods.values()))


@pytest.mark.parametrize(
    ("spoilt", "least"),
    [
        (lambda picture: picture.filter(ImageFilter.GaussianBlur(1.0)), 0.94),
        (lambda picture: Image.fromarray(np.pad(np.asarray(picture), ((2, 0), (0, 2), (0, 0)), mode="edge")[:64, 2:]), 0.9),
        (lambda picture: picture.resize((256, 256), Image.Resampling.BICUBIC), 0.98),
    ],
    ids=["blurred", "moved by two pixels", "four times as large"],
)
def test_soft_moved_and_large_pictures_keep_their_scores(spoilt: Any, least: float) -> None:
    pictures = [drawn(scene, index) for index, scene in enumerate(SOME_SCENES)]
    clean, after = (
        np.mean([value(score[MEAN]) for score in CHECK.score([of_scene(*pair) for pair in zip(SOME_SCENES, shown, strict=True)])])
        for shown in (pictures, [spoilt(picture) for picture in pictures])
    )
    assert after > least * clean


def test_an_empty_picture_and_noise_earn_nothing_but_the_background() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for scene in SOME_SCENES:
        empty = Image.new("RGB", (64, 64), BACKGROUNDS[scene.background])
        for picture in (empty, noise):
            (scores,) = CHECK.score([of_scene(scene, picture)])
            assert max(value(scores[f"check_{name}"]) for name in ("shape", "text")) < 0.05
            assert max(value(scores[f"check_{name}"]) for name in ("color", "position")) < 0.3
        (scores,) = CHECK.score([of_scene(scene, empty)])
        assert value(scores["check_background"]) > 0.8


def test_shapes_at_every_place_do_not_win_the_position() -> None:
    scene = Scene("red", "circle", "left", "white", "")
    pixels = [np.asarray(render(replace(scene, position=position), 64, 0)) for position in POSITIONS]
    (scores,) = CHECK.score([of_scene(scene, Image.fromarray(np.min(pixels, axis=0)))])
    assert value(scores["check_position"]) < 0.3


@pytest.mark.parametrize("wording", range(NUM_WORDINGS))
def test_only_what_the_prompt_says_is_scored(wording: int) -> None:
    scene = Scene("red", "circle", "left", "white", "")
    (scores,) = CHECK.score([of_scene(scene, drawn(scene, 0), wording)])
    asked = {name for name in ATTRIBUTES if isinstance(scores[f"check_{name}"], Value)}
    assert asked == {"color", "shape", "position"} | ({"background"} if wording in (1, 2) else set())
    assert scores["check_text"] == Invalid("not asked for")
    assert value(scores[MEAN]) == pytest.approx(np.mean([value(scores[f"check_{name}"]) for name in asked]))


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("A RED circle, on the left.", {"color", "shape", "position"}),
        ("something else", set()),
        ('the text "K7" beside it', {"text"}),
        ("the text K77", set()),
        ("redder circles", set()),
    ],
)
def test_words_of_the_prompt_decide_what_is_asked(prompt: str, asked: set[str]) -> None:
    assert set(asked_in(Scene("red", "circle", "left", "white", "K7"), prompt)) == asked


def test_without_a_plain_scene_all_is_invalid() -> None:
    assert CHECK.score([request(prompt="a red circle on the left")]) == [dict.fromkeys(CHECK.names, Invalid("no plain scene"))]


def test_what_has_no_template_is_invalid_and_left_out_of_the_mean() -> None:
    scene = Scene("red", "circle", "left", PHOTO, "GOLD")
    picture = compose(replace(scene, text=""), Image.new("RGB", (64, 64), (90, 120, 90)), 0)
    (scores,) = CHECK.score([of_scene(scene, picture)])
    assert scores["check_background"] == scores["check_text"] == Invalid("no template for it")
    assert value(scores[MEAN]) > 0.9


@pytest.mark.parametrize("operation", ["attribute", "background", "text", "removal"])
def test_of_an_edit_its_one_change_is_scored(operation: str) -> None:
    scene = Scene("red", "circle", "left", "white", "K7")
    edit = edit_scene(operation, scene, SCENES, keyed_generator(1), 5)
    assert edit is not None
    asked = request(edit.target, edit.instruction, sources=edit.references, notes=edit.notes)
    done, undone = CHECK.score([asked, replace(asked, image=edit.references[0])])
    name = f"check_{edit.notes['change']['attribute']}"
    assert {other for other in CHECK.names if isinstance(done[other], Value)} == {name, MEAN}
    assert value(done[name]) > 0.7
    assert value(undone[name]) < 0.55
