"""Text images: captions are true to the letter, texts lie within their boxes, and a text with a missing glyph is dropped."""

import numpy as np
import pytest
from PIL import Image

from model_core.data.corpus import CHINESE, ENGLISH
from model_core.data.keys import keyed_generator
from model_core.data.text_rendering import (
    COLORS,
    MIN_CONTRAST,
    DroppedError,
    Setting,
    TextImage,
    color_pair,
    compositional,
    draw_text,
    pure,
    setting_of,
    template,
    wrap,
)
from model_core.data.typefaces import TYPEFACES, Typeface, check_typefaces, covers, font
from model_core.documents import UserError
from model_core.recipe import TextImages


def setting(language: str = "en", size_px: int = 64, font_px: tuple[int, int] = (10, 18)) -> Setting:
    return Setting(size_px=size_px, language=language, face=TYPEFACES[language][0], font_px=font_px)


def drawn(mode: str, language: str, key: int) -> TextImage | None:
    generator = keyed_generator(mode, language, key)
    chosen = setting_of(64, language, (10, 18), generator)
    try:
        if mode == "compositional":
            background = Image.new("RGB", (64, 64), (128, 128, 128))
            return compositional(chosen, generator, background=background, caption="a gray wall", free_side=None)
        return (pure if mode == "pure" else template)(chosen, generator)
    except DroppedError:
        return None


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("mode", ["pure", "compositional", "template"])
def test_captions_quote_every_text_and_name_its_colours(mode, language):
    results = [result for key in range(30) if (result := drawn(mode, language, key))]
    assert len(results) >= 5
    for result in results:
        for text in result.notes["text"]:
            assert f'"{text}"' in result.caption or f"“{text}”" in result.caption
        if "“" not in result.caption:
            assert result.notes["text_color"] in result.caption
            assert result.notes["background"] in result.caption


def test_the_named_colours_are_the_painted_ones():
    for key in range(20):
        result = drawn("pure", "en", key)
        if result is None:
            continue
        pixels = np.asarray(result.image, dtype=int).reshape(-1, 3)
        assert tuple(pixels[0]) == COLORS[result.notes["background"]]
        assert np.abs(pixels - COLORS[result.notes["text_color"]]).max(1).min() < 30


@pytest.mark.parametrize("language", ["en", "zh"])
def test_text_stays_within_its_box_but_for_descenders(language):
    words = ["STAR", "LAMP"] if language == "en" else ["你好", "世界"]
    picture = Image.new("RGB", (64, 64), "white")
    draw_text(picture, words, (12, 8, 52, 56), "black", setting(language), keyed_generator("box"))
    rows, columns = np.nonzero(np.asarray(picture.convert("L")) < 128)
    assert rows.min() >= 7
    assert rows.max() <= 57
    assert columns.min() >= 11
    assert columns.max() <= 53


@pytest.mark.parametrize(("language", "sign"), [("en", "H"), ("zh", "国")])
@pytest.mark.parametrize("glyph_px", [10, 18])
def test_glyphs_are_as_high_as_asked_for(language, sign, glyph_px):
    _, top, _, bottom = font(TYPEFACES[language][0], glyph_px).getbbox(sign)
    assert abs(bottom - top - glyph_px) <= 2  # both edges are rounded outwards


def test_a_text_with_a_missing_glyph_is_dropped_whole():
    latin_only = Typeface("matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf", "H")
    assert covers(latin_only, "two words")
    assert not covers(latin_only, "two 你好")
    chosen = Setting(size_px=64, language="zh", face=latin_only, font_px=(10, 18))
    with pytest.raises(DroppedError, match="a glyph is missing"):
        draw_text(Image.new("RGB", (64, 64)), ["你好"], (0, 0, 64, 64), "white", chosen, keyed_generator("glyph"))


def test_a_text_that_does_not_fit_at_the_least_height_is_dropped():
    with pytest.raises(DroppedError, match="does not fit"):
        draw_text(Image.new("RGB", (64, 64)), ["ENORMOUSNESS"], (0, 0, 30, 64), "white", setting(), keyed_generator("fit"))


def test_wrapping_keeps_all_words_in_order_and_no_line_is_too_wide():
    words = ["one", "two", "three", "four", "five"]
    lines = wrap(words, setting(), 10, 200.0)
    assert " ".join(lines).split() == words
    assert len(lines) > 1
    assert all(font(setting().face, 40).getlength(line) <= 200 for line in lines)


def test_every_corpus_word_has_glyphs_in_every_typeface_of_its_language():
    for language, words in (("en", ENGLISH), ("zh", CHINESE)):
        for face in TYPEFACES[language]:
            assert all(covers(face, word) for word in words), (face.file, language)


def test_inks_stand_out_from_their_paper():
    weights = np.array([0.2126, 0.7152, 0.0722])
    for key in range(200):
        paper, ink = color_pair(keyed_generator("pair", key))
        assert abs(np.dot(weights, COLORS[paper]) - np.dot(weights, COLORS[ink])) / 255 >= MIN_CONTRAST - 1e-9


def test_a_sign_hangs_on_the_free_side():
    background = Image.new("RGB", (64, 64), (128, 128, 128))
    changed = 0
    for key in range(20):
        try:
            result = compositional(setting("zh"), keyed_generator("side", key), background=background, caption="a wall", free_side="left")
        except DroppedError:
            continue
        difference = np.abs(np.asarray(result.image, dtype=int) - 128).max(-1) > 8
        changed += difference[:, :32].sum()
        assert difference[:, 40:].sum() == 0
    assert changed > 0


def test_larger_pictures_get_more_points_on_a_slide():
    slides = []
    for key in range(30):
        try:
            result = template(setting("en", 256, (14, 20)), keyed_generator("big", key))
        except DroppedError:
            continue
        if result.notes["layout"] == "slide":
            slides.append(len(result.notes["text"]))
    assert max(slides) == 5


def test_a_missing_font_package_is_refused_before_work(monkeypatch):
    monkeypatch.setattr("model_core.data.typefaces.find_spec", lambda name: None if name == "mplfonts" else object())
    check_typefaces(TextImages(languages=["en"]))
    with pytest.raises(UserError, match="text_images.languages: found zh, which needs the package mplfonts"):
        check_typefaces(TextImages(languages=["en", "zh"]))
    check_typefaces(TextImages(languages=["zh"], num_images=0))
