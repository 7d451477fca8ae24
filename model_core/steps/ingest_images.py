"""ingest_images: pictures and captions from the recipe's sources, as raw shards (R1 2.1).

Takes nothing; leaves `shards/`, `index.json` and `samples.png`. Pictures come upright, in RGB on white, their long side at
most `data.max_side_px`. What has no caption or cannot be decoded is counted and named, not taken.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from PIL import Image

from model_core.context import StepContext
from model_core.data.buckets import fit
from model_core.data.contact_sheet import NUM_SAMPLES, contact_sheet
from model_core.data.folders import LocalFolder
from model_core.data.keys import keyed_generator
from model_core.data.layouts import read_folder
from model_core.data.shards import BROKEN, RawRow, decode_image, make_row, spread_rows, unique_rows, write_rows
from model_core.data.skipped import Skipped
from model_core.data.sources import CAPTION_FORMS, IMAGE_SUFFIXES, SCENES, SourceFolder, decode_picture, open_source
from model_core.data.synthetic import NUM_WORDINGS, PHOTO, Scene, compose, describe, render, training_scenes
from model_core.documents import UserError
from model_core.recipe import Data

NUM_BACKGROUNDS = 64  # photographs kept at hand for scenes that are drawn over one
BROKEN_PICTURE = "cannot be decoded"


def run(context: StepContext) -> dict[str, Any]:
    """Reads every source; returns counts, what was skipped and the seconds it took."""
    began = time.monotonic()
    skipped, repeated = Skipped(), Skipped()
    counts: dict[str, int] = {}
    rows = unique_rows(_rows(context, skipped, counts), repeated)
    total = write_rows(context.output, islice(rows, context.recipe.data.max_images))
    if not total:
        sources = ", ".join(context.recipe.data.sources)
        raise UserError(f"data.sources: {sources}: found no picture with a caption; allowed are {CAPTION_FORMS}")
    context.progress.update(total, total, "pictures")
    samples = spread_rows(LocalFolder(context.output), NUM_SAMPLES)
    contact_sheet([[decode_image(row.image)] for row in samples], columns=12).save(context.output / "samples.png")
    for warning in skipped.warnings():
        context.progress.say(warning)
    return {
        "rows": total,
        "sources": counts,
        "skipped": skipped.counts | repeated.counts,
        "warnings": skipped.warnings(),
        "data_seconds": round(time.monotonic() - began, 3),
    }


def _rows(context: StepContext, skipped: Skipped, counts: dict[str, int]) -> Iterator[RawRow]:
    """The rows of all sources: photographs first, since scenes may be drawn over them."""
    seen = 0
    backgrounds: list[Image.Image] = []
    folders = {uri: open_source(uri, context.site) for uri in context.recipe.data.sources if uri != SCENES}
    expected = _expected(context.recipe.data, folders.values())
    for source in sorted(context.recipe.data.sources, key=lambda uri: uri == SCENES):
        rows = _scene_rows(context, backgrounds) if source == SCENES else _folder_rows(context, folders[source], skipped, backgrounds)
        for row in rows:
            seen += 1
            counts[source] = counts.get(source, 0) + 1
            yield row
            context.progress.update(seen, max(seen + 1, expected), "pictures")


def _expected(data: Data, folders: Iterable[SourceFolder]) -> int:
    """How many pictures there will be, as far as file names tell; what archives hold is found when they are read."""
    drawn = data.scenes.num_images if SCENES in data.sources else 0
    total = drawn + sum(len(folder.with_suffix(*IMAGE_SUFFIXES)) for folder in folders)
    return min(total, data.max_images or total)


def _folder_rows(context: StepContext, folder: SourceFolder, skipped: Skipped, backgrounds: list[Image.Image]) -> Iterator[RawRow]:
    data = context.recipe.data
    for found in read_folder(folder, skipped, scratch=context.scratch):
        try:
            picture, encoded = decode_picture(found.data, data.max_side_px)
        except BROKEN:
            skipped.add(BROKEN_PICTURE, found.name)
            continue
        if data.scenes.photo_background_share > 0 and len(backgrounds) < NUM_BACKGROUNDS:
            backgrounds.append(fit(picture, (data.scenes.size_px, data.scenes.size_px)))
        yield make_row(
            picture,
            kind="image",
            encoded=encoded,
            caption=found.note.caption,
            provenance=f"{folder.label}/{found.name}",
            licence=found.note.licence or data.licence,
        )


def _scene_rows(context: StepContext, backgrounds: list[Image.Image]) -> Iterator[RawRow]:
    config, seed = context.recipe.data.scenes, context.recipe.seed
    for index, scene in enumerate(training_scenes(config, seed=seed)):
        generator = keyed_generator(seed, "scene background", index)
        if backgrounds and generator.random() < config.photo_background_share:
            scene = Scene(**{**scene.to_dict(), "background": PHOTO})
            picture = compose(scene, backgrounds[generator.integers(len(backgrounds))], seed, index)
        else:
            picture = render(scene, config.size_px, seed, index)
        yield make_row(
            picture,
            kind="image",
            caption=describe(scene, int(generator.integers(NUM_WORDINGS))),
            annotation=scene.to_json(),
            provenance=f"{SCENES}/{index}",
            licence="CC0-1.0",
        )
