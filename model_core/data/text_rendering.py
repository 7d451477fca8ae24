"""Synthetic text images (Qwen-Image 1.0 report, 3.4): pure text, text in a scene, filled templates.

Text is set into a box at the largest glyph height that fits, and dropped as a whole when it does not fit or a glyph is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from model_core.data.corpus import join, phrase
from model_core.data.typefaces import TYPEFACES, Typeface, ascent, covers, font

OVERSAMPLING = 4
LINE_PITCH = {"en": 1.5, "zh": 1.25}  # of the glyph height; Latin needs room for descenders
MIN_CONTRAST = 0.45  # between relative luminances
MARGIN = 1 / 16  # of the side

COLORS = {
    "white": (252, 252, 252),
    "black": (20, 20, 24),
    "gray": (150, 150, 156),
    "cream": (250, 240, 214),
    "yellow": (246, 214, 70),
    "pink": (250, 205, 214),
    "light blue": (200, 226, 248),
    "light green": (206, 236, 204),
    "red": (200, 35, 40),
    "blue": (35, 70, 190),
    "green": (20, 110, 60),
    "purple": (105, 40, 150),
    "brown": (105, 62, 32),
    "orange": (240, 130, 30),
}
CHINESE_COLORS = dict(
    zip(
        COLORS,
        ("白色", "黑色", "灰色", "米色", "黄色", "粉色", "浅蓝色", "浅绿色", "红色", "蓝色", "绿色", "紫色", "棕色", "橙色"),
        strict=True,
    )
)


class DroppedError(Exception):
    """A text that was not drawn, and why."""


@dataclass(frozen=True)
class TextImage:
    """A rendered text image, its caption and what it shows."""

    image: Image.Image
    caption: str
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How text is set: size of the picture, language, typeface, least and most glyph height."""

    size_px: int
    language: str
    face: Typeface
    font_px: tuple[int, int]

    def box(self, left: float, top: float, right: float, bottom: float) -> tuple[int, int, int, int]:
        """A box in pixels from shares of the side."""
        return round(left * self.size_px), round(top * self.size_px), round(right * self.size_px), round(bottom * self.size_px)


def pure(setting: Setting, generator: np.random.Generator) -> TextImage:
    """A short paragraph on a plain background. Raises DroppedError."""
    paper, ink = color_pair(generator)
    words = phrase(setting.language, generator, num_words=int(generator.integers(1, 6)))
    picture = Image.new("RGB", (setting.size_px, setting.size_px), COLORS[paper])
    text = draw_text(picture, words, setting.box(MARGIN, MARGIN, 1 - MARGIN, 1 - MARGIN), ink, setting, generator)
    if setting.language == "zh" and generator.random() < 0.5:
        caption = f"{CHINESE_COLORS[paper]}背景上的{CHINESE_COLORS[ink]}文字“{text}”"
    elif generator.random() < 0.5:
        caption = f'the text "{text}" in {ink} on {_a(paper)} background'
    else:
        caption = f'{_a(paper)} picture with the {ink} text "{text}"'
    return TextImage(picture, caption, _notes("pure", setting, [text], background=paper, text_color=ink))


def compositional(
    setting: Setting, generator: np.random.Generator, *, background: Image.Image, caption: str, free_side: str | None
) -> TextImage:
    """A sign with a text in a picture of (size_px, size_px), on its free side where one is known. Raises DroppedError."""
    paper, ink = color_pair(generator)
    side = free_side or ("top", "bottom")[generator.integers(2)]
    left, top, right, bottom = {
        "left": (0, 0.2, 0.5, 0.8),
        "right": (0.5, 0.2, 1, 0.8),
        "top": (0.05, 0, 0.95, 0.5),
        "bottom": (0.05, 0.5, 0.95, 1),
    }[side]
    panel_box = setting.box(left + 0.03, top + 0.06, right - 0.03, bottom - 0.06)
    inner = (2, 1, panel_box[2] - panel_box[0] - 2, panel_box[3] - panel_box[1] - 1)
    panel = Image.new("RGB", (panel_box[2] - panel_box[0], panel_box[3] - panel_box[1]), COLORS[paper])
    words = phrase(setting.language, generator, num_words=int(generator.integers(1, 4)))
    text = draw_text(panel, words, inner, ink, setting, generator)
    picture = _hang(background, panel, panel_box[:2], paper=paper, angle=float(generator.uniform(-5, 5)))
    said = f'{_a(paper)} sign with the {ink} text "{text}" in front of {caption}'
    return TextImage(picture, said, _notes("compositional", setting, [text], background=paper, text_color=ink, scene=caption))


def template(setting: Setting, generator: np.random.Generator) -> TextImage:
    """A slide (title band, points) or a poster (frame, big word, line below), filled with words. Raises DroppedError."""
    return (slide, poster)[generator.integers(2)](setting, generator)


def slide(setting: Setting, generator: np.random.Generator) -> TextImage:
    """A slide: a band with its title, and points below, each behind a dot."""
    band, title_ink = color_pair(generator)
    paper, ink = color_pair(generator, other_than=band)
    picture = Image.new("RGB", (setting.size_px, setting.size_px), COLORS[paper])
    picture.paste(COLORS[band], setting.box(0, 0, 1, 0.34))
    title = draw_text(
        picture,
        phrase(setting.language, generator, num_words=1),
        setting.box(MARGIN, 0.03, 1 - MARGIN, 0.31),
        title_ink,
        setting,
        generator,
    )
    num_points = max(1, min(4, int(0.62 * setting.size_px / (1.6 * setting.font_px[0]))))
    points, pitch = [], 0.6 / num_points
    even = replace(setting, font_px=(setting.font_px[0], min(setting.font_px[1], setting.font_px[0] + 1)))  # points look alike
    draw = ImageDraw.Draw(picture)
    for index in range(num_points):
        top = 0.37 + index * pitch
        words = phrase(setting.language, generator, num_words=1)
        points.append(draw_text(picture, words, setting.box(0.16, top, 1 - MARGIN / 2, top + pitch), ink, even, generator, align="left"))
        x, y, radius = 0.085 * setting.size_px, (top + pitch / 2) * setting.size_px, max(1.2, 0.022 * setting.size_px)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLORS[ink])
    listed = " and ".join(f'"{point}"' for point in points)
    caption = f'a slide with the title "{title}" in {title_ink} on {band}, and {listed} in {ink} on {_a(paper)} background'
    return TextImage(
        picture,
        caption,
        _notes("template", setting, [title, *points], layout="slide", background=paper, text_color=ink, band=band, band_color=title_ink),
    )


def poster(setting: Setting, generator: np.random.Generator) -> TextImage:
    """A poster: a frame, a big word, a rule and a line below it."""
    paper, ink = color_pair(generator)
    picture = Image.new("RGB", (setting.size_px, setting.size_px), COLORS[paper])
    width = max(1, setting.size_px // 32)
    ImageDraw.Draw(picture).rectangle(
        (width, width, setting.size_px - 1 - width, setting.size_px - 1 - width), outline=COLORS[ink], width=width
    )
    title = draw_text(
        picture, phrase(setting.language, generator, num_words=1), setting.box(0.09, 0.1, 0.91, 0.55), ink, setting, generator
    )
    picture.paste(COLORS[ink], setting.box(0.3, 0.58, 0.7, 0.6))
    line = draw_text(picture, phrase(setting.language, generator, num_words=1), setting.box(0.09, 0.63, 0.91, 0.9), ink, setting, generator)
    caption = f'{_a(paper)} poster with the {ink} title "{title}" and the line "{line}"'
    return TextImage(picture, caption, _notes("template", setting, [title, line], layout="poster", background=paper, text_color=ink))


def color_pair(generator: np.random.Generator, *, other_than: str = "") -> tuple[str, str]:
    """Names of a background and of an ink that stands out from it."""
    names = [name for name in COLORS if name != other_than]
    paper = names[generator.integers(len(names))]
    inks = [name for name in COLORS if abs(_luminance(COLORS[name]) - _luminance(COLORS[paper])) >= MIN_CONTRAST]
    return paper, inks[generator.integers(len(inks))]


def draw_text(
    picture: Image.Image,
    words: list[str],
    box: tuple[int, int, int, int],
    ink: str,
    setting: Setting,
    generator: np.random.Generator,
    *,
    align: str = "center",
) -> str:
    """Sets the words into a box (left, top, right, bottom) of the picture and returns them as text.

    Starts at a drawn glyph height and gets smaller until the text fits; raises DroppedError at the least one, or for a missing glyph.
    """
    text = join(words, setting.language)
    if not covers(setting.face, text):
        raise DroppedError("a glyph is missing")
    left, top, right, bottom = box
    least, most = setting.font_px
    for glyph_px in range(int(generator.integers(least, most + 1)), least - 1, -1):
        lines = wrap(words, setting, glyph_px, (right - left) * OVERSAMPLING)
        pitch = LINE_PITCH[setting.language] * glyph_px
        height = glyph_px + pitch * (len(lines) - 1)
        if lines and height <= bottom - top:
            break
    else:
        raise DroppedError("does not fit")
    face = font(setting.face, glyph_px * OVERSAMPLING)
    mask = Image.new("L", (picture.width * OVERSAMPLING, picture.height * OVERSAMPLING))
    draw = ImageDraw.Draw(mask)
    first = (top + bottom - height) / 2 + ascent(setting.face) * glyph_px
    x, anchor = (left, "ls") if align == "left" else ((left + right) / 2, "ms")
    for index, line in enumerate(lines):
        draw.text((x * OVERSAMPLING, (first + index * pitch) * OVERSAMPLING), line, font=face, fill=255, anchor=anchor)
    picture.paste(COLORS[ink], (0, 0), mask.resize(picture.size, Image.Resampling.BOX))
    return text


def wrap(words: list[str], setting: Setting, glyph_px: int, width: float) -> list[str]:
    """The words in lines of at most `width` oversampled pixels, as few as possible; none when a single word is wider."""
    face = font(setting.face, glyph_px * OVERSAMPLING)
    lines: list[list[str]] = [[]]
    for word in words:
        if face.getlength(word) > width:
            return []
        if lines[-1] and face.getlength(join([*lines[-1], word], setting.language)) > width:
            lines.append([])
        lines[-1].append(word)
    return [join(line, setting.language) for line in lines]


def setting_of(size_px: int, language: str, font_px: tuple[int, int], generator: np.random.Generator) -> Setting:
    """A setting in one of the language's typefaces."""
    faces = TYPEFACES[language]
    return Setting(size_px=size_px, language=language, face=faces[generator.integers(len(faces))], font_px=font_px)


def _hang(background: Image.Image, panel: Image.Image, place: tuple[int, int], *, paper: str, angle: float) -> Image.Image:
    """The panel over the background, turned by `angle` degrees, with a soft shadow."""
    big = (panel.width * OVERSAMPLING, panel.height * OVERSAMPLING)
    turned = panel.resize(big, Image.Resampling.LANCZOS).rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=COLORS[paper])
    cover = Image.new("L", big, 255).rotate(angle, Image.Resampling.BICUBIC, expand=True)
    size = (round(turned.width / OVERSAMPLING), round(turned.height / OVERSAMPLING))
    turned, cover = turned.resize(size, Image.Resampling.BOX), cover.resize(size, Image.Resampling.BOX)
    left, top = place[0] - (size[0] - panel.width) // 2, place[1] - (size[1] - panel.height) // 2
    picture = background.convert("RGB").copy()
    shadow = Image.new("L", picture.size)
    shadow.paste(cover.point(lambda value: value // 2), (left + 1, top + 1))
    picture.paste((0, 0, 0), (0, 0), shadow.filter(ImageFilter.GaussianBlur(1)))
    picture.paste(turned, (left, top), cover)
    return picture


def _notes(mode: str, setting: Setting, texts: Sequence[str], **known: str) -> dict[str, Any]:
    return {"mode": mode, "language": setting.language, "text": list(texts), **known}


def _luminance(color: tuple[int, int, int]) -> float:
    """Relative luminance, 0 to 1 (Rec. 709 weights on gamma-coded values, which is enough to tell light from dark)."""
    return (0.2126 * color[0] + 0.7152 * color[1] + 0.0722 * color[2]) / 255


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
