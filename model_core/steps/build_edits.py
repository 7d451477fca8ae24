"""build_edits: pairs of pictures and the instructions between them (R1 2.1).

Takes the ingested pictures; leaves `shards/` (a row's picture is the target, its references are the sources), `index.json`
and `samples.png`, where sources stand left of their target.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from PIL import Image

from model_core.context import StepContext
from model_core.data.contact_sheet import NUM_SAMPLES, contact_sheet
from model_core.data.edits import Edit, applies, crop_of, edit_photo, edit_scene
from model_core.data.folders import LocalFolder
from model_core.data.keys import keyed_generator
from model_core.data.shards import RawRow, decode_image, draw_rows, make_row, read_rows, spread_rows, unique_rows, write_rows
from model_core.data.skipped import Skipped
from model_core.data.synthetic import PHOTO, Scene, scene_from_dict
from model_core.documents import UserError

NUM_SECONDS = 64  # photographs at hand for edits that take two
NO_CHANGE = "no change that may be shown"


def run(context: StepContext) -> dict[str, Any]:
    """Makes the recipe's number of pairs, less those that came out twice; returns counts by operation and seconds."""
    began = time.monotonic()
    skipped = Skipped()
    counts: dict[str, int] = {}
    planned = _plan(context)
    total = write_rows(context.output, unique_rows(_rows(context, planned, skipped, counts), skipped))
    samples = spread_rows(LocalFolder(context.output), NUM_SAMPLES)
    groups = [[decode_image(image) for image in (*row.references, row.image)] for row in samples]
    contact_sheet(groups, columns=4, titles=[row.instruction for row in samples]).save(context.output / "samples.png")
    return {"rows": total, "operations": counts, "skipped": skipped.counts, "data_seconds": round(time.monotonic() - began, 3)}


def _plan(context: StepContext) -> dict[int, list[tuple[int, str]]]:
    """(pair, operation) by the place of the source among the ingested pictures; operations take turns, sources are drawn.

    Raises UserError when the pictures allow none of the operations. Held-out pictures are no sources.
    """
    config, seed = context.recipe.edits, context.recipe.seed
    places: dict[str, list[int]] = {operation: [] for operation in config.operations}
    for place, row in enumerate(read_rows(context.inputs["images"], columns=("annotation", "held_out"))):
        for operation in config.operations:
            if not row.held_out and applies(operation, _scene_of(row)):
                places[operation].append(place)
    operations = [operation for operation in dict.fromkeys(config.operations) if places[operation]]
    if config.num_pairs and not operations:
        raise UserError(f"edits.operations: found {', '.join(config.operations)}, which no picture of data.sources allows; add style")
    planned: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for pair in range(config.num_pairs):
        operation = operations[pair % len(operations)]
        choice = keyed_generator(seed, "edit source", pair).integers(len(places[operation]))
        planned[places[operation][choice]].append((pair, operation))
    return planned


def _rows(context: StepContext, planned: dict[int, list[tuple[int, str]]], skipped: Skipped, counts: dict[str, int]) -> Iterator[RawRow]:
    config, done = context.recipe.edits, 0
    seconds = _seconds(context)
    for place, row in enumerate(read_rows(context.inputs["images"])):
        scene = _scene_of(row)
        photo = decode_image(row.image) if scene is None and place in planned else None
        for pair, operation in planned.get(place, ()):
            edit = _edit(context, pair, operation, scene=scene, photo=photo, row=row, seconds=seconds)
            done += 1
            context.progress.update(done, config.num_pairs, "edit pairs")
            if edit is None:
                skipped.add(NO_CHANGE, f"{operation} of {row.provenance}")
                continue
            counts[operation] = counts.get(operation, 0) + 1
            yield make_row(
                edit.target,
                kind="edit",
                references=edit.references,
                instruction=edit.instruction,
                operation=operation,
                caption=edit.caption,
                annotation=json.dumps(edit.notes, sort_keys=True),
                provenance=f"{operation} of {row.provenance}",
                licence=row.licence,
            )


def _edit(
    context: StepContext,
    pair: int,
    operation: str,
    *,
    scene: Scene | None,
    photo: Image.Image | None,
    row: RawRow,
    seconds: list[RawRow],
) -> Edit | None:
    generator = keyed_generator(context.recipe.seed, "edit", pair)
    if scene is not None:
        return edit_scene(operation, scene, context.recipe.data.scenes, generator, context.recipe.seed, "edit", pair)
    assert photo is not None
    if "shape" not in row.notes():  # what a scene's caption names is all in view only in the whole picture
        photo = crop_of(photo, generator)
    others = [other for other in seconds if other.sample_id != row.sample_id]
    chosen = others[generator.integers(len(others))] if others else None
    second = (decode_image(chosen.image), chosen.caption) if chosen and operation == "multi_reference" else None
    return edit_photo(operation, photo, row.caption, generator, second=second)


def _seconds(context: StepContext) -> list[RawRow]:
    """A keyed choice of photographs for edits that take two."""
    photos = (row for row in read_rows(context.inputs["images"]) if not row.held_out and _scene_of(row) is None)
    return draw_rows(photos, NUM_SECONDS, context.recipe.seed, "second photograph")


def _scene_of(row: RawRow) -> Scene | None:
    """The plain scene that a row shows, which can be drawn again; None for photographs and scenes over one."""
    notes = row.notes()
    return scene_from_dict(notes) if "shape" in notes and notes["background"] != PHOTO else None
