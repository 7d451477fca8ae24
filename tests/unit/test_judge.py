"""The judge against pictures whose content is known, clean, spoilt and empty."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from model_core.data.synthetic import BACKGROUNDS, COLORS, POSITIONS, SHAPES, Scene, compose, held_out_scenes, render
from model_core.evaluation.attributes import plain_prompts, shares
from model_core.evaluation.hard import (
    WORDS,
    photo_scene_prompts,
    read_photo_scene,
    read_two_shapes,
    read_word,
    two_shape_prompts,
    word_picture,
)
from model_core.evaluation.judge import ATTRIBUTES, UNREADABLE, Judge, accuracy
from model_core.recipe import Scenes

SCENES = Scenes()


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(SCENES)


def noisy(picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture) + np.random.default_rng(0).normal(0, 15, (picture.height, picture.width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def compressed(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=20)
    return Image.open(buffer)


def moved(picture: Image.Image) -> Image.Image:
    padded = np.pad(np.asarray(picture), ((2, 2), (2, 2), (0, 0)), mode="edge")
    return Image.fromarray(padded[3:67, 1:65])


@pytest.mark.parametrize(
    ("spoil", "least"),
    [
        (lambda picture: picture, 0.99),
        (lambda picture: picture.filter(ImageFilter.GaussianBlur(1.2)), 0.98),
        (noisy, 0.98),
        (compressed, 0.98),
        (moved, 0.95),
        (lambda picture: picture.resize((128, 128), Image.Resampling.BICUBIC), 0.98),
    ],
    ids=["clean", "blurred", "noisy", "compressed", "moved by a pixel", "twice as large"],
)
def test_reads_held_out_renders(judge, spoil, least):
    scenes = held_out_scenes(64, SCENES, seed=5)
    read = accuracy(scenes, [judge.read(spoil(render(scene, 64, "test", index))) for index, scene in enumerate(scenes)])
    assert min(read.values()) >= least, read


def test_validation_passes_its_own_bar(judge):
    assert min(judge.validate(96, seed=1).values()) >= 0.98


@pytest.mark.parametrize("position", POSITIONS)
def test_reads_every_shape_color_and_background(judge, position):
    for shape in SHAPES:
        for color in COLORS:
            for background in BACKGROUNDS:
                scene = Scene(color, shape, position, background, "")
                reading = judge.read(render(scene, 64, "grid"))
                assert [getattr(reading, name) for name in ATTRIBUTES] == [color, shape, position, "", background]


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("RGB", (64, 64), (252, 252, 252)),
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)),
        Image.fromarray(np.random.default_rng(2).integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC),
    ],
    ids=["plain", "noise", "blobs"],
)
def test_a_picture_of_nothing_reads_as_nothing(judge, picture):
    reading = judge.read(picture)
    assert [reading.color, reading.shape, reading.position, reading.text] == [UNREADABLE] * 4


def test_a_text_that_is_half_there_is_unreadable(judge):
    scene = Scene("red", "circle", "left", "white", "A7")
    picture = render(scene, 64, "half")
    picture.paste(BACKGROUNDS["white"], (48, 0, 64, 64))
    assert judge.read(picture).text == UNREADABLE
    assert judge.read(render(replace(scene, text=""), 64, "half")).text == ""


def test_reads_two_shapes_each_at_its_place(judge):
    for prompt in two_shape_prompts(6, seed=3):
        picture = Image.new("RGB", (64, 64), BACKGROUNDS["white"])
        for position in {name.split()[0] for name in prompt.asked}:
            scene = Scene(prompt.asked[f"{position} color"], prompt.asked[f"{position} shape"], position, "white", "")
            half = {"left": (0, 0, 32, 64), "right": (32, 0, 64, 64), "top": (0, 0, 64, 32), "bottom": (0, 32, 64, 64)}[position]
            picture.paste(render(scene, 64, "two").crop(half), half)
        assert read_two_shapes(judge, picture, prompt.asked) == prompt.asked


def test_reads_words_and_sees_none_in_plain_scenes():
    for index, word in enumerate(WORDS[::4]):
        picture = word_picture(word, 8 + 2 * (index % 3), ink=12, paper=250).filter(ImageFilter.GaussianBlur(0.5))
        assert read_word(picture)[0] == word
    for index, scene in enumerate(held_out_scenes(4, SCENES, seed=0)):
        assert read_word(render(scene, 64, index))[0] == UNREADABLE


def test_a_scene_over_a_photograph_is_told_from_a_plain_one(judge):
    ground = Image.fromarray(np.random.default_rng(4).integers(60, 180, (3, 3, 3), dtype=np.uint8)).resize(
        (64, 64), Image.Resampling.BICUBIC
    )
    for index, prompt in enumerate(photo_scene_prompts(4, SCENES, seed=0)):
        scene = Scene(**prompt.asked)
        assert read_photo_scene(judge, compose(scene, ground, index))["background"] == "photo"
        assert read_photo_scene(judge, render(replace(scene, background="white"), 64, index)) == prompt.asked | {"background": "white"}


def test_prompts_ask_for_what_their_words_name():
    prompts = plain_prompts(32, SCENES, seed=0)
    assert len({prompt.seed for prompt in prompts}) == 32
    for prompt in prompts:
        words = prompt.text.split()
        assert all(value in words for value in prompt.asked.values())
        assert ("background" in prompt.asked) == any(name in words for name in BACKGROUNDS)


def test_shares_count_only_what_was_asked_for():
    verdicts = [
        {"color": True, "shape": True, "position": True, "text": False},
        {"color": True, "shape": False, "position": True, "background": True},
    ]
    assert shares(verdicts) == {"color": 1.0, "shape": 0.5, "position": 1.0, "text": 0.0, "background": 1.0, "mean": 0.625, "all": 0.0}
