"""render_text: synthetic text images (Qwen-Image 1.0 report, 3.4): pure text, text in a scene, filled templates.

Takes the ingested pictures, as backgrounds; leaves `shards/`, `index.json` and `samples.png`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from model_core.context import StepContext
from model_core.data.buckets import fit
from model_core.data.contact_sheet import NUM_SAMPLES, contact_sheet
from model_core.data.folders import LocalFolder
from model_core.data.keys import keyed_generator
from model_core.data.shards import RawRow, decode_image, draw_rows, make_row, read_rows, spread_rows, unique_rows, write_rows
from model_core.data.skipped import Skipped
from model_core.data.text_rendering import DroppedError, Setting, TextImage, compositional, pure, setting_of, template
from model_core.data.typefaces import check_typefaces
from model_core.documents import UserError

NUM_BACKGROUNDS = 256
MAX_ATTEMPTS = 20  # texts tried for one picture before it is given up
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


def run(context: StepContext) -> dict[str, Any]:
    """Draws the recipe's number of text images; returns counts, dropped texts by reason and seconds."""
    config = context.recipe.text_images
    began = time.monotonic()
    check_typefaces(config)
    dropped, repeated = Skipped(), Skipped()
    modes: dict[str, int] = {}
    total = write_rows(context.output, unique_rows(_rows(context, dropped, modes), repeated))
    if config.num_images and not total:
        found = f"glyphs of {config.font_px[0]} px or more on pictures of {config.size_px} px"
        raise UserError(f"text_images: found {found}, where no text fits; allowed are larger pictures or smaller glyphs")
    samples = spread_rows(LocalFolder(context.output), NUM_SAMPLES)
    contact_sheet([[decode_image(row.image)] for row in samples], columns=12).save(context.output / "samples.png")
    return {"rows": total, "modes": modes, "dropped": dropped.counts, "data_seconds": round(time.monotonic() - began, 3)}


def _rows(context: StepContext, dropped: Skipped, modes: dict[str, int]) -> Iterator[RawRow]:
    config, seed = context.recipe.text_images, context.recipe.seed
    backgrounds = _backgrounds(context) if config.num_images and config.modes.get("compositional") else []
    weights = {mode: weight for mode, weight in sorted(config.modes.items()) if weight > 0 and (mode != "compositional" or backgrounds)}
    shares = np.array(list(weights.values())) / sum(weights.values()) if weights else np.zeros(0)
    for index in range(config.num_images if weights else 0):
        generator = keyed_generator(seed, "text image", index)
        mode = str(generator.choice(list(weights), p=shares))
        language = config.languages[generator.integers(len(config.languages))]
        for _ in range(MAX_ATTEMPTS):
            setting = setting_of(config.size_px, language, config.font_px, generator)
            background = backgrounds[generator.integers(len(backgrounds))] if mode == "compositional" else None
            try:
                drawn = _draw(mode, setting, generator, background)
            except DroppedError as reason:
                dropped.add(str(reason), f"text image {index}")
                continue
            modes[mode] = modes.get(mode, 0) + 1
            yield make_row(
                drawn.image,
                kind="text_image",
                caption=drawn.caption,
                annotation=json.dumps(drawn.notes, ensure_ascii=False, sort_keys=True),
                provenance=f"synthetic://text/{mode}/{index}" + (f" over {background.provenance}" if background else ""),
                licence=background.licence if background else "CC0-1.0",
            )
            break
        context.progress.update(index + 1, config.num_images, "text images")


def _draw(mode: str, setting: Setting, generator: np.random.Generator, background: RawRow | None) -> TextImage:
    if background is None:
        return (pure if mode == "pure" else template)(setting, generator)
    picture = fit(decode_image(background.image), (setting.size_px, setting.size_px))
    free_side = OPPOSITE.get(background.notes().get("position", ""))
    return compositional(setting, generator, background=picture, caption=background.caption, free_side=free_side)


def _backgrounds(context: StepContext) -> list[RawRow]:
    """A keyed choice of the ingested pictures; plain scenes only where they leave room for a text."""
    free = (row for row in read_rows(context.inputs["images"]) if not row.held_out and not row.notes().get("text"))
    return draw_rows(free, NUM_BACKGROUNDS, context.recipe.seed, "background")
