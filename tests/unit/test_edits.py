"""Edits: one thing changes and the rest stays to the pixel; instructions, notes and pictures agree."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from model_core.data.edits import (
    PHOTO_OPERATIONS,
    applies,
    check_edits,
    color_transfer,
    crop_of,
    damage_of,
    edit_photo,
    edit_scene,
    styled,
)
from model_core.data.keys import keyed_generator
from model_core.data.synthetic import BACKGROUNDS, COLORS, PHOTO, Scene, is_held_out, render, scene_from_dict, training_scene
from model_core.documents import UserError
from model_core.recipe import Recipe, Scenes

CONFIG = Scenes()
OPERATIONS = ("attribute", "background", "style", "text", "removal", "restoration", "multi_reference")


def scene(key: int, **fixed: str) -> Scene:
    return replace(training_scene(CONFIG, "edit test", key), **fixed)


def edits(operation: str, num: int = 25):
    for key in range(num):
        source = training_scene(CONFIG, operation, key)
        if applies(operation, source):
            edit = edit_scene(operation, source, CONFIG, keyed_generator("edit", key), "jitter", key)
            assert edit is not None
            yield source, edit


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_source_or_target_is_held_out(operation):
    for source, edit in edits(operation):
        for name in ("source", "target", "second"):
            if name in edit.notes:
                assert not is_held_out(scene_from_dict(edit.notes[name]), CONFIG.held_out_share)
        assert edit.notes["source"] == source.to_dict()


@pytest.mark.parametrize("operation", ["attribute", "background", "text", "removal", "multi_reference"])
def test_source_and_target_differ_in_the_one_thing_that_is_noted(operation):
    for _, edit in edits(operation):
        source, target, change = edit.notes["source"], edit.notes["target"], edit.notes["change"]
        assert [name for name in source if source[name] != target[name]] == [change["attribute"]]
        assert (source[change["attribute"]], target[change["attribute"]]) == (change["from"], change["to"])
        assert edit.target.tobytes() != edit.references[0].tobytes()


@pytest.mark.parametrize("operation", ["attribute", "text", "removal"])
def test_pixels_outside_the_noted_region_stay(operation):
    for source, edit in edits(operation):
        differs = np.abs(np.asarray(edit.target, dtype=int) - np.asarray(edit.references[0], dtype=int)).max(-1) > 0
        shape_half = {
            "left": (slice(None), slice(0, 32)),
            "right": (slice(None), slice(32, 64)),
            "top": (slice(0, 32), slice(None)),
            "bottom": (slice(32, 64), slice(None)),
        }[source.position]
        in_shape_half = np.zeros((64, 64), dtype=bool)
        in_shape_half[shape_half] = True
        inside = in_shape_half if edit.notes["change"]["region"] == "shape" else ~in_shape_half
        assert differs[inside].any()
        assert differs[~inside].sum() <= 8  # what jitter may push over the middle


def test_multi_reference_takes_the_thing_from_the_second_picture():
    for _, edit in edits("multi_reference"):
        attribute = edit.notes["change"]["attribute"]
        assert edit.notes["target"][attribute] == edit.notes["second"][attribute]
        assert len(edit.references) == 2
        assert attribute in edit.instruction
        assert "second image" in edit.instruction


def test_instructions_name_what_they_ask_for():
    for operation in ("attribute", "background", "text"):
        for _, edit in edits(operation):
            assert edit.notes["change"]["to"] in edit.instruction
    for _, edit in edits("removal"):
        assert edit.instruction.startswith("remove the text")
    added = [edit.instruction for source, edit in edits("text", 60) if not source.text]
    assert added
    assert all("add" in instruction or "write" in instruction for instruction in added)


def test_removal_needs_a_text_and_photographs_know_three_operations():
    assert not applies("removal", scene(0, text=""))
    assert applies("removal", scene(0, text="A7"))
    for photo in (None, scene(0, background=PHOTO)):
        assert tuple(operation for operation in sorted(OPERATIONS) if applies(operation, photo)) == PHOTO_OPERATIONS


def test_no_style_is_asked_of_a_scene_that_is_told_by_its_colours_alone():
    unseen = [
        (color, background)
        for color in COLORS
        for background in BACKGROUNDS
        if not applies("style", scene(0, color=color, background=background))
    ]
    assert unseen == [("orange", "gray")]
    for color, background in [("yellow", "white"), ("red", "gray"), ("purple", "black")]:
        picture = styled(render(Scene(color, "circle", "left", background, ""), 64, "key"), "black and white").convert("L")
        assert abs(picture.getpixel((16, 32)) - picture.getpixel((56, 8))) >= 24


def test_an_edit_whose_every_target_is_held_out_is_not_made():
    source = training_scene(CONFIG, "none")
    only_text = Scenes(letters=source.text[0] if source.text else "A", digits=source.text[1] if source.text else "0")
    text = only_text.letters + only_text.digits
    assert edit_scene("text", replace(source, text=text), only_text, keyed_generator(0), "jitter") is None


def test_black_and_white_is_rec_601_luma_and_sepia_is_warm():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert styled(red, "black and white").getpixel((0, 0)) == (76, 76, 76)
    r, g, b = styled(Image.new("RGB", (4, 4), (100, 100, 100)), "sepia").getpixel((0, 0))
    assert (r, g, b) == (135, 120, 94)


def test_damage_is_of_the_source_and_the_target_is_whole():
    picture = render(Scene("red", "circle", "left", "gray", "A7"), 64, "key")
    seen = set()
    for key in range(20):
        name, damaged, instruction = damage_of(picture, keyed_generator("damage", key))
        seen.add(name)
        assert np.abs(np.asarray(damaged, dtype=int) - np.asarray(picture, dtype=int)).mean() > 0.5
        assert name in instruction or {"noise": "noisy", "blur": "blurred"}[name] in instruction
    assert seen == {"noise", "blur"}


def test_colour_transfer_takes_over_mean_and_spread():
    generator = np.random.default_rng(0)
    first = Image.fromarray(generator.normal(128, 12, (32, 32, 3)).clip(0, 255).astype(np.uint8))
    second = Image.fromarray(generator.normal((150, 120, 100), 20, (32, 32, 3)).clip(0, 255).astype(np.uint8))
    moved = np.asarray(color_transfer(first, second).convert("YCbCr"), dtype=float)
    wanted = np.asarray(second.convert("YCbCr"), dtype=float)
    assert np.allclose(moved.mean((0, 1)), wanted.mean((0, 1)), atol=1.5)
    assert np.allclose(moved.std((0, 1)), wanted.std((0, 1)), rtol=0.15)


def test_photographs_are_edited_in_crops_of_their_own_shape():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    sizes = {crop_of(photo, keyed_generator("crop", key)).size for key in range(10)}
    assert len(sizes) > 3
    assert all(abs(width / height - 1.5) < 0.06 for width, height in sizes)


@pytest.mark.parametrize("operation", PHOTO_OPERATIONS)
def test_edits_of_photographs_describe_their_target(operation):
    photo, other = Image.new("RGB", (48, 32), (200, 30, 30)), Image.new("RGB", (40, 40), (30, 30, 200))
    edit = edit_photo(operation, photo, "a red wall", keyed_generator(operation), second=(other, "a blue wall"))
    assert edit is not None
    assert "a red wall" in edit.caption
    assert edit.notes["source"] is None
    assert edit.target.size == edit.references[0].size
    assert len(edit.references) == (2 if operation == "multi_reference" else 1)


def test_an_edit_of_two_photographs_needs_a_second_one():
    assert edit_photo("multi_reference", Image.new("RGB", (8, 8)), "a wall", keyed_generator(0), second=None) is None


def test_backgrounds_change_everywhere_but_under_the_shape():
    for source, edit in edits("background", 5):
        assert edit.target.getpixel((0, 0)) == BACKGROUNDS[edit.notes["target"]["background"]] or source.text


def test_operations_that_no_source_allows_are_refused_before_work(tmp_path):
    document = {"name": "x", "mmdit": {"stages": {"S1": {}}}, "edits": {"operations": ["text", "removal"]}}
    check_edits(Recipe.model_validate(document))
    with pytest.raises(UserError, match="edits.operations: found text, removal, which need synthetic://scenes"):
        check_edits(Recipe.model_validate(document | {"data": {"sources": [tmp_path.as_uri()]}}))
