"""Preference pairs for the eye: sources, then a and b, a green frame round the better one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from model_core.data.preferences import Preference
from model_core.data.shards import decode_image

NUM_SHOWN = 6  # pairs of a kind
CELL_PX = 128
FRAME_PX = 4
BETTER, EQUAL = (40, 200, 80), (240, 200, 60)
TITLE_SIGNS = 62


def groups_of(shown: Mapping[str, Sequence[Preference]]) -> tuple[list[list[Image.Image]], list[str]]:
    """Groups and titles of a contact sheet: sources, a and b of each pair, framed in yellow where they are equal."""
    groups, titles = [], []
    for kind, rows in shown.items():
        for row in rows:
            frames = {"a": (BETTER, None), "b": (None, BETTER), "tie": (EQUAL, EQUAL)}.get(row.label, (None, None))
            pictures = [_framed(picture, frame) for picture, frame in zip(row.pictures(), frames, strict=True)]
            groups.append([*(_framed(decode_image(source), None) for source in row.sources), *pictures])
            titles.append(f"{kind.partition(',')[0]} ({row.reason}): {row.prompt}"[:TITLE_SIGNS])
    return groups, titles


def _framed(picture: Image.Image, color: tuple[int, int, int] | None) -> Image.Image:
    """The picture as large as its cell, with a frame of the colour inside its edge."""
    scale = CELL_PX / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    large = picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
    if color is not None:
        ImageDraw.Draw(large).rectangle((0, 0, large.width - 1, large.height - 1), outline=color, width=FRAME_PX)
    return large
