"""Examples that the Prompt Enhancer learns from: a short request, and the answer that gives the fine prompt back.

Example number n is a pure function of the data, the settings and n: which caption or edit it is of, and how that is degraded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import pyarrow.parquet as pq

from model_core.data.degradation import Degraded, degrade, thoughts
from model_core.data.enhanced_prompt import EnhancedPrompt, answer_text, aspect_ratio_of
from model_core.data.folders import Folder
from model_core.data.instruction_summaries import summarise
from model_core.data.keys import keyed_generator, keyed_permutation, one_of
from model_core.data.shards import RawRow, draw_rows, read_rows
from model_core.data.synthetic import Scene, describe, scene_from_dict
from model_core.documents import UserError
from model_core.recipe_enhancer import Degradation, Enhancer

Kind = Literal["image", "edit"]
COLUMNS = ("sample_id", "kind", "width", "height", "annotation", "held_out")
EDIT_COLUMNS = (*COLUMNS, "references", "instruction")
MAX_SOURCES = 65_536  # of a kind that are held in memory
FINE_WORDINGS = (1, 2)  # of `synthetic.describe`: those that name everything


@dataclass(frozen=True, kw_only=True)
class FinePrompt:
    """A prompt that the generator follows well: a caption or, where there are pictures, an edit's instruction.

    Of a plain scene `fine` is empty: it is described in one of several wordings.
    """

    fine: str = ""
    scene: Scene | None = None
    aspect_ratio: str = "1:1"
    num_images: int = 0


@dataclass(frozen=True, kw_only=True)
class Example:
    """A request with the number of its pictures, the fine prompt that it was made of, how, and the answer to learn."""

    request: str
    num_images: int
    fine: str
    degraded: Degraded
    answer: str


def read_fine_prompts(images: Folder, edits: Folder, captions: Folder, *, held_out: bool, seed: int) -> dict[Kind, list[FinePrompt]]:
    """Fine prompts by kind, of rows that are held out or of those that are not: at most MAX_SOURCES each, drawn by `seed`."""
    table = pq.read_table(captions.path("captions.parquet"), columns=["sample_id", "general"])
    texts = dict(zip(table["sample_id"].to_pylist(), table["general"].to_pylist(), strict=True))
    rows = (row for row in read_rows(images, COLUMNS) if row.held_out == held_out and texts.get(row.sample_id))
    pictures = [_of_picture(row, texts[row.sample_id]) for row in draw_rows(rows, MAX_SOURCES, seed, "enhancer")]
    found = (_of_edit(row) for row in read_rows(edits, EDIT_COLUMNS) if row.held_out == held_out and row.instruction)
    drawn = draw_rows(found, MAX_SOURCES, seed, "enhancer")
    instructions = [FinePrompt(fine=row.instruction, num_images=len(row.references)) for row in drawn]
    return {"image": pictures, "edit": instructions}


def check_fine_prompts(prompts: Mapping[Kind, Sequence[FinePrompt]]) -> None:
    """Raises UserError when there is nothing to learn from."""
    if not any(prompts.values()):
        raise UserError("train_enhancer: found no caption or instruction that is not held out; allowed is at least one")


def example_of(prompt: FinePrompt, rates: Mapping[Degradation, float], *key: object) -> Example:
    """The example that `key` makes of a fine prompt."""
    generator = keyed_generator(*key)
    if prompt.num_images:
        request, step = summarise(prompt.fine, generator)
        degraded, fine = Degraded(request, (step,)), prompt.fine
        said = EnhancedPrompt(prompt=fine, follow_image=1, thoughts=tuple(thoughts(degraded.steps)))
    else:
        fine = describe(prompt.scene, one_of(FINE_WORDINGS, generator)) if prompt.scene else prompt.fine
        degraded = degrade(fine, rates, generator)
        said = EnhancedPrompt(prompt=fine, aspect_ratio=prompt.aspect_ratio, thoughts=tuple(thoughts(degraded.steps)))
    return Example(request=degraded.short, num_images=prompt.num_images, fine=fine, degraded=degraded, answer=answer_text(said))


def training_example(prompts: Mapping[Kind, Sequence[FinePrompt]], number: int, config: Enhancer, *, seed: int) -> Example:
    """Example `number`: each kind in rounds of keyed orders, degraded anew each time; edits make `edit_share` of the examples.

    A kind without prompts leaves its share to the other.
    """
    share = config.edit_share if prompts["image"] and prompts["edit"] else float(bool(prompts["edit"]))
    before, after = round(number * share), round((number + 1) * share)
    kind: Kind = "edit" if after > before else "image"
    place = before if kind == "edit" else number - before
    pool = prompts[kind]
    chosen = pool[_order(len(pool), seed, kind, place // len(pool))[place % len(pool)]]
    return example_of(chosen, config.degradations, seed, "enhancer", kind, place)


@lru_cache(maxsize=4)
def _order(num: int, seed: int, kind: Kind, epoch: int) -> list[int]:
    """The order of an epoch; kept, since example after example asks for it."""
    order: list[int] = keyed_permutation(num, seed, "enhancer", kind, epoch).tolist()
    return order


def _of_picture(row: RawRow, caption: str) -> FinePrompt:
    notes = row.notes()
    scene = scene_from_dict(notes) if "shape" in notes else None
    return FinePrompt(fine="" if scene else caption, scene=scene, aspect_ratio=aspect_ratio_of(row.width, row.height))


def _of_edit(row: RawRow) -> RawRow:
    """The row without its pictures, of which only the number counts."""
    return RawRow(sample_id=row.sample_id, instruction=row.instruction, references=(b"",) * len(row.references))
