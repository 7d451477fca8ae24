"""Prompts that a policy is trained on: captions of pictures and instructions of edits, in an order that is a pure function of its key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from model_core.data.buckets import bucket, fit
from model_core.data.folders import Folder
from model_core.data.keys import keyed_permutation
from model_core.data.shards import RawRow, decode_image, draw_rows, read_rows
from model_core.documents import UserError
from model_core.recipe import CaptionType

COLUMNS = ("sample_id", "kind", "width", "height", "annotation", "held_out")
EDIT_COLUMNS = (*COLUMNS, "references", "instruction")
MAX_PROMPTS = 4096  # of a kind that are held in memory, with the sources of edits


@dataclass(frozen=True, kw_only=True)
class PolicyPrompt:
    """What to draw: `size_px` is (height, width), `encoded` are an edit's condition images as files; `notes` are the row's annotation.

    `category` chooses the weights of rewards: edit, portrait, text, scene or image.
    """

    prompt_id: str
    prompt: str
    category: str
    size_px: tuple[int, int]
    encoded: Sequence[bytes] = field(default=(), repr=False)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sources(self) -> list[Image.Image]:
        """The condition images, fitted to `size_px`; decoded each time, since all prompts of a run are held in memory."""
        return [fit(decode_image(source), self.size_px) for source in self.encoded]

    @property
    def shape(self) -> tuple[tuple[int, int], int]:
        """Size and number of sources: prompts of one shape go through the model together."""
        return self.size_px, len(self.encoded)


def category_of(row: RawRow) -> str:
    """The category of a row's prompt, by what its annotation tells."""
    notes = row.notes()
    if row.kind == "edit":
        return "edit"
    if "portrait" in notes:
        return "portrait"
    if notes.get("text"):
        return "text"
    return "scene" if "shape" in notes else "image"


def read_prompts(
    images: Folder, edits: Folder, captions: Folder, *, resolution_px: int, multiple_px: int, caption: CaptionType = "general", seed: int
) -> dict[str, list[PolicyPrompt]]:
    """Prompts by kind, `image` and `edit`, of rows that are not held out: at most MAX_PROMPTS each, drawn by `seed`.

    Raises UserError when there are none at all.
    """
    table = pq.read_table(captions.path("captions.parquet"), columns=["sample_id", caption])
    texts = dict(zip(table["sample_id"].to_pylist(), table[caption].to_pylist(), strict=True))
    found: dict[str, list[PolicyPrompt]] = {"image": [], "edit": []}
    for kind, folder in (("image", images), ("edit", edits)):
        columns = EDIT_COLUMNS if kind == "edit" else COLUMNS
        rows = (row for row in read_rows(folder, columns) if not row.held_out)
        for row in draw_rows(rows, MAX_PROMPTS, seed, "policy prompts"):
            text = row.instruction if kind == "edit" else texts.get(row.sample_id, "")
            if text:
                found[kind].append(_prompt(row, text, bucket(row.width, row.height, resolution_px, multiple_px=multiple_px)))
    if not any(found.values()):
        raise UserError("align_grpo: found no prompt among captions and edits that are not held out; allowed is at least one")
    return found


def prompts_of_update(
    prompts: Mapping[str, Sequence[PolicyPrompt]], update: int, num: int, *, edit_share: float, seed: int
) -> list[PolicyPrompt]:
    """The `num` prompts of an update, each kind in rounds of keyed orders; over the updates edits make `edit_share` of them.

    A kind without prompts leaves its share to the other.
    """
    share = edit_share if prompts["image"] and prompts["edit"] else float(bool(prompts["edit"]))
    done, after = (round(step * num * share) for step in (update, update + 1))
    chosen = []
    for kind, first, last in (("image", update * num - done, (update + 1) * num - after), ("edit", done, after)):
        pool = prompts[kind]
        for place in range(first, last):
            order = keyed_permutation(len(pool), seed, "policy prompts", kind, place // len(pool))
            chosen.append(pool[int(order[place % len(pool)])])
    return chosen


def _prompt(row: RawRow, text: str, size_px: tuple[int, int]) -> PolicyPrompt:
    return PolicyPrompt(
        prompt_id=row.sample_id.hex(),
        prompt=text,
        category=category_of(row),
        size_px=size_px,
        encoded=row.references,
        notes=row.notes(),
    )
