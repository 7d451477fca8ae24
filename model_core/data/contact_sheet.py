"""Contact sheets: what a step has made, for the eye."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from model_core.data.typefaces import TYPEFACES, font

NUM_SAMPLES = 48
GAP_PX = 4
TITLE_PX = 13
BACKGROUND = (96, 96, 102)


def contact_sheet(
    groups: Sequence[Sequence[Image.Image]], *, columns: int, cell_px: int = 128, titles: Sequence[str] | None = None
) -> Image.Image:
    """Groups of pictures, each group side by side, `columns` groups a row; every picture in a square cell, each group below its title.

    Small pictures are enlarged by whole factors without smoothing, so that their pixels can be judged.
    """
    width = max((len(group) for group in groups), default=1)
    rows = max(1, -(-len(groups) // columns))
    head_px = TITLE_PX + GAP_PX if titles else 0
    step = (width * (cell_px + GAP_PX) + 2 * GAP_PX, head_px + cell_px + 2 * GAP_PX)
    sheet = Image.new("RGB", (columns * step[0], rows * step[1]), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, group in enumerate(groups):
        left, top = (index % columns) * step[0] + GAP_PX, (index // columns) * step[1] + GAP_PX
        if titles:
            draw.text((left, top), titles[index], font=font(TYPEFACES["en"][0], TITLE_PX - 4), fill="white")
        for place, picture in enumerate(group):
            cell = _in_cell(picture, cell_px)
            corner = (left + place * (cell_px + GAP_PX) + (cell_px - cell.width) // 2, top + head_px + (cell_px - cell.height) // 2)
            sheet.paste(cell, corner)
    return sheet


def _in_cell(picture: Image.Image, cell_px: int) -> Image.Image:
    factor = cell_px // max(picture.size)
    if factor >= 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    scale = cell_px / max(picture.size)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS)
