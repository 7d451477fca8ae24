"""Plain scenes: what is held out never shows, pictures show what they say, and equal keys give equal pixels."""

import numpy as np
import pytest
from PIL import Image

from model_core.data.synthetic import (
    BACKGROUNDS,
    COLORS,
    PHOTO,
    POSITIONS,
    SHAPES,
    TEXT_CENTERS,
    Scene,
    compose,
    describe,
    held_out_scenes,
    is_held_out,
    render,
    scene_from_dict,
    text_is_held_out,
    training_scenes,
    triple_is_held_out,
)
from model_core.documents import UserError
from model_core.recipe import Scenes

CONFIG = Scenes(num_images=400)


def test_no_training_scene_shows_a_held_out_combination_or_text():
    for scene in training_scenes(CONFIG, seed=1):
        assert not triple_is_held_out(scene, CONFIG.held_out_share)
        assert not text_is_held_out(scene.text, CONFIG.held_out_share)


def test_held_out_scenes_show_both_a_held_out_combination_and_a_held_out_text():
    for scene in held_out_scenes(50, CONFIG, seed=1):
        assert triple_is_held_out(scene, CONFIG.held_out_share)
        assert text_is_held_out(scene.text, CONFIG.held_out_share)


def test_held_out_shares_are_near_the_setting():
    triples = [Scene(color, shape, position, "white", "") for color in COLORS for shape in SHAPES for position in POSITIONS]
    texts = [Scene("red", "circle", "left", "white", letter + digit) for letter in CONFIG.letters for digit in CONFIG.digits]
    assert 0.03 < np.mean([triple_is_held_out(scene, 0.1) for scene in triples]) < 0.2
    assert 0.03 < np.mean([text_is_held_out(scene.text, 0.1) for scene in texts]) < 0.2


def test_scenes_without_text_are_held_out_by_their_combination_alone():
    scene = Scene("red", "circle", "left", "white", "")
    assert is_held_out(scene, 0.1) == triple_is_held_out(scene, 0.1)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_shape_has_its_colour_and_lies_in_its_half(shape, position):
    picture = np.asarray(render(Scene("red", shape, position, "black", "A7"), 64, "key"), dtype=float)
    rows, columns = np.nonzero(np.abs(picture - COLORS["red"]).max(-1) < 3)
    assert 150 < len(rows) < 900
    side = {"left": columns.mean() < 24, "right": columns.mean() > 40, "top": rows.mean() < 24, "bottom": rows.mean() > 40}
    assert side[position]


@pytest.mark.parametrize("position", POSITIONS)
def test_each_character_stays_in_its_own_cell_of_sixteen_pixels_give_or_take_one(position):
    with_text = np.asarray(render(Scene("red", "circle", position, "white", "H8"), 64, "key"), dtype=int)
    without = np.asarray(render(Scene("red", "circle", position, "white", ""), 64, "key"), dtype=int)
    rows, columns = np.nonzero(np.abs(with_text - without).max(-1) > 40)
    allowed = np.zeros((64, 64), dtype=bool)
    for x, y in TEXT_CENTERS[position]:
        left, top = round(x * 64) - 8, round(y * 64) - 8
        allowed[max(0, top - 1) : top + 17, max(0, left - 1) : left + 17] = True
    assert len(rows) > 40
    assert allowed[rows, columns].all()


def test_equal_keys_give_equal_pixels_and_other_keys_move_things_by_a_pixel_at_most():
    scene = Scene("blue", "square", "top", "gray", "K3")
    assert render(scene, 64, 1, 2).tobytes() == render(scene, 64, 1, 2).tobytes()
    centers = []
    for key in range(40):
        rows, columns = np.nonzero(np.abs(np.asarray(render(scene, 64, key), dtype=int) - COLORS["blue"]).max(-1) < 3)
        centers.append((rows.mean(), columns.mean()))
    spread = np.ptp(np.array(centers), axis=0)
    assert (spread > 0.5).all()
    assert (spread <= 2.01).all()


def test_only_what_differs_between_two_scenes_differs_between_their_pictures():
    first = np.asarray(render(Scene("blue", "square", "left", "white", "K3"), 64, "key"), dtype=int)
    second = np.asarray(render(Scene("red", "square", "left", "white", "K3"), 64, "key"), dtype=int)
    assert not np.abs(first - second)[:, 32:].any()


def test_describe_has_a_short_wording_and_one_that_names_the_background():
    scene = Scene("red", "circle", "left", "gray", "A7")
    assert describe(scene, 0) == "a red circle on the left with the text A7"
    assert describe(scene, 1) == "a red circle on the left of a gray background with the text A7"
    assert describe(Scene("orange", "star", "top", "pink", ""), 0) == "an orange star on the top"


def test_every_wording_names_colour_shape_position_and_text():
    for wording in range(4):
        assert {"red", "circle", "left", "A7"} <= set(describe(Scene("red", "circle", "left", "gray", "A7"), wording).split())


def test_a_scene_survives_its_mapping():
    scene = Scene("red", "circle", "left", "gray", "A7")
    assert scene_from_dict(scene.to_dict()) == scene


def test_text_over_a_photograph_has_a_dark_rim_and_a_light_core():
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    picture = np.asarray(compose(Scene("red", "circle", "left", PHOTO, "H8"), grey, "key"))[:, 32:]
    assert picture.max() > 230
    assert picture.min() < 60


def test_settings_that_leave_no_text_to_train_on_are_refused():
    text = next(text for text in (letter + "0" for letter in CONFIG.letters + "IJOQUVW") if text_is_held_out(text, 0.45))
    with pytest.raises(UserError, match="held-out texts only"):
        list(training_scenes(Scenes(letters=text[0], digits="0", text_share=1.0, held_out_share=0.45), seed=0))


def test_backgrounds_are_painted_as_named():
    for name, color in BACKGROUNDS.items():
        assert render(Scene("red", "circle", "left", name, ""), 64, "key").getpixel((63, 63)) == color
