"""What the pairs of build_preferences are about: users' photographs, and prompts and edits for models to draw. Nothing held out."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow.parquet as pq

from model_core.context import StepContext
from model_core.data.buckets import bucket, fit
from model_core.data.keys import key_bytes
from model_core.data.known_pairs import caption_split, instruction_split, scene_split
from model_core.data.preferences import Split
from model_core.data.shards import RawRow, decode_image, draw_rows, read_rows
from model_core.data.synthetic import PHOTO, scene_from_dict
from model_core.data.synthetic_preferences import Photo
from model_core.evaluation.sampled_pairs import SampledPrompt
from model_core.recipe import CompressionRatio, Preferences, Scenes

NUM_PHOTOS = 512  # photographs at hand for pairs of known order
MULTIPLE_PX = 2 * CompressionRatio  # of sides, as an encoder that sees images needs them
NO_PHOTOS = "the data hold neither plain scenes nor photographs that may be trained on; all pairs are of drawn scenes and portraits"


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """`scenes` are drawn in the model's size; `photo_share` of the pairs show photographs; `prompts` are for models to draw."""

    scenes: Scenes
    photos: list[Photo]
    photo_share: float
    prompts: list[SampledPrompt]
    warnings: list[str]


def read_subjects(context: StepContext) -> Subjects:
    """Reads images, captions and edits; everything is drawn by the recipe's seed."""
    recipe, inputs = context.recipe, context.inputs
    stage = inputs["model"].manifest.stage
    resolution_px = recipe.mmdit.stages[stage if stage in recipe.mmdit.stages else recipe.stages[-1]].resolution_px
    reader = _Reader(context, resolution_px)
    photos = reader.photos()
    share = 0.0 if not photos else 0.5 if reader.any_scene else 1.0
    return Subjects(
        scenes=recipe.data.scenes.model_copy(update={"size_px": resolution_px}),
        photos=photos,
        photo_share=share,
        prompts=reader.prompts(recipe.preferences.num_sampled),
        warnings=[] if photos or reader.any_scene else [NO_PHOTOS],
    )


class _Reader:
    """The usable rows of images and edits; `any_scene` says whether plain scenes are among the images."""

    def __init__(self, context: StepContext, resolution_px: int) -> None:
        self._inputs, self._seed = context.inputs, context.recipe.seed
        self._config: Preferences = context.recipe.preferences
        self._resolution_px = resolution_px
        table = pq.read_table(context.inputs["captions"].path("captions.parquet"), columns=["sample_id", "general"])
        self._captions: dict[bytes, str] = dict(zip(table["sample_id"].to_pylist(), table["general"].to_pylist(), strict=True))
        self._splits: dict[str, set[Split]] = {}  # by provenance
        self._usable: set[bytes] = set()
        self._photo_ids: set[bytes] = set()
        self.any_scene = False
        for row in read_rows(context.inputs["images"], columns=("sample_id", "caption", "annotation", "provenance", "held_out")):
            plain = _is_plain(row)
            self.any_scene = self.any_scene or plain
            self._splits.setdefault(row.provenance, set()).add(self._split(row))
            if not row.held_out and row.sample_id in self._captions:
                self._usable.add(row.sample_id)
                if not plain:
                    self._photo_ids.add(row.sample_id)

    def photos(self) -> list[Photo]:
        """At most NUM_PHOTOS photographs; one that is there twice, with two captions, is taken once."""
        if not self._photo_ids:
            return []
        rows = (row for row in read_rows(self._inputs["images"]) if row.sample_id in self._photo_ids)
        taken = {row.image: row for row in draw_rows(rows, NUM_PHOTOS, self._seed, "preference photographs")}
        return [
            Photo(fit(decode_image(image), self._size_px(row)), self._captions[row.sample_id], self._split(row))
            for image, row in taken.items()
        ]

    def prompts(self, num: int) -> list[SampledPrompt]:
        """`num` prompts, half of them edits where there are some whose instruction and sources are of one split."""
        if not num:
            return []
        edits = self._edits(num // 2)
        chosen = set(sorted(self._usable, key=lambda sample: key_bytes(self._seed, "sampled prompt", sample))[: num - len(edits)])
        pictures = [
            SampledPrompt(
                text=self._captions[row.sample_id],
                category="text" if row.notes().get("text") else "scene",
                split=self._split(row),
                size_px=self._size_px(row),
                notes={"scene": row.notes()} if _is_plain(row) else {},
            )
            for row in read_rows(self._inputs["images"], columns=("sample_id", "caption", "annotation", "width", "height"))
            if row.sample_id in chosen
        ]
        return pictures + edits

    def _edits(self, num: int) -> list[SampledPrompt]:
        columns = ("sample_id", "held_out", "instruction", "operation", "annotation", "provenance")
        rows = read_rows(self._inputs["edits"], columns=columns)
        splits = {row.sample_id: split for row in rows if not row.held_out and (split := self._edit_split(row)) is not None}
        chosen = set(sorted(splits, key=lambda sample: key_bytes(self._seed, "sampled edit", sample))[:num])
        prompts = []
        for row in read_rows(self._inputs["edits"]) if chosen else ():
            if row.sample_id in chosen:
                size_px = self._size_px(row)
                sources = [fit(decode_image(reference), size_px) for reference in row.references]
                notes = {"operation": row.operation, **{name: row.notes()[name] for name in ("source", "target")}}
                split = splits[row.sample_id]
                prompts.append(
                    SampledPrompt(text=row.instruction, category="edit", split=split, size_px=size_px, sources=sources, notes=notes)
                )
        return prompts

    def _edit_split(self, row: RawRow) -> Split | None:
        """The split of an edit's instruction, where all of its sources are of the same; None for others."""
        notes, asked = row.notes(), instruction_split(self._config, row.instruction)
        if notes["source"] is not None:
            scenes = [notes["source"], *([notes["second"]] if "second" in notes else [])]
            splits = {scene_split(self._config, scene_from_dict(scene)) for scene in scenes}
        elif row.operation == "multi_reference":  # which photograph was the second is not known any more
            return None
        else:
            splits = self._splits[row.provenance.removeprefix(f"{row.operation} of ")]
        return asked if splits == {asked} else None

    def _split(self, row: RawRow) -> Split:
        """By the scene, drawn over a photograph or not, whose captions are the same; else by the source's caption."""
        notes = row.notes()
        if "shape" in notes:
            return scene_split(self._config, scene_from_dict(notes))
        return caption_split(self._config, self._captions.get(row.sample_id, row.caption))

    def _size_px(self, row: RawRow) -> tuple[int, int]:
        if row.width == row.height:
            return self._resolution_px, self._resolution_px
        return bucket(row.width, row.height, self._resolution_px, multiple_px=MULTIPLE_PX)


def _is_plain(row: RawRow) -> bool:
    """Whether it is a plain scene, which can be drawn again."""
    notes = row.notes()
    return "shape" in notes and notes["background"] != PHOTO
