"""build_preferences on small data with a tiny model of random weights: what is drawn, labelled, counted, and kept apart."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from model_core.data.edits import edit_photo, edit_scene
from model_core.data.folders import LocalFolder
from model_core.data.keys import keyed_generator
from model_core.data.preferences import FILE_NAME, Preference, read_preferences
from model_core.data.shards import RawRow, decode_image, make_row, write_rows
from model_core.data.synthetic import describe, render, training_scenes
from model_core.data.votes import Vote, vote_line
from model_core.documents import UserError
from model_core.evaluation import sampled_pairs
from model_core.evaluation.drawing import Painter, Request
from model_core.recipe import DIMENSIONS, Recipe
from model_core.site import Site
from model_core.steps import build_preferences

SCENES = {"num_images": 40}


class Input(LocalFolder):
    """An input folder as the step sees it."""

    def __init__(self, root: Path, digest: str = "0" * 64) -> None:
        super().__init__(root)
        object.__setattr__(self, "manifest", SimpleNamespace(stage="S1", label="train_mmdit-S1", content_digest=digest))

    def folder(self, prefix: str) -> Path:
        return self.root / prefix


def photo(index: int) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((96, 64), Image.Resampling.BICUBIC)


def scene_rows(recipe: Recipe) -> tuple[list[RawRow], list[RawRow]]:
    rows, edits = [], []
    for index, scene in enumerate(training_scenes(recipe.data.scenes, seed=0)):
        place = f"synthetic://scenes/{index}"
        rows.append(
            make_row(render(scene, 64, index), kind="image", caption=describe(scene, index), annotation=scene.to_json(), provenance=place)
        )
        edit = edit_scene("attribute", scene, recipe.data.scenes, keyed_generator(index), index)
        if edit is not None:
            known: dict[str, Any] = {"instruction": edit.instruction, "operation": "attribute", "annotation": json.dumps(edit.notes)}
            edits.append(make_row(edit.target, kind="edit", references=edit.references, provenance=f"attribute of {place}", **known))
    return rows, edits


def photo_rows() -> tuple[list[RawRow], list[RawRow]]:
    rows, edits = [], []
    for index in range(30):
        rows.append(make_row(photo(index), kind="image", caption=f"blobs number {index}", provenance=f"photos/{index}.png"))
        edit = edit_photo("style", photo(index), f"blobs number {index}", keyed_generator(index), second=None)
        assert edit is not None
        known: dict[str, Any] = {"instruction": edit.instruction, "operation": "style", "annotation": json.dumps(edit.notes)}
        edits.append(make_row(edit.target, kind="edit", references=edit.references, provenance=f"style of photos/{index}.png", **known))
    return rows, edits


def paint(_painter: Any, requests: Sequence[Request], *, on_drawn: Any) -> list[Image.Image]:
    """Stands for a model: one flat colour a seed."""
    on_drawn(len(requests))
    colors = [tuple(int(value) for value in keyed_generator(request.seed).integers(0, 256, 3)) for request in requests]
    return [Image.new("RGB", request.size_px[::-1], color) for request, color in zip(requests, colors, strict=True)]


def quantised(_vae: Any, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Stands for the autoencoder, and leaves a trace that can be told: every level is a multiple of 4."""
    return [picture.point(lambda level: level // 4 * 4) for picture in pictures]


def build(
    folder: Path, *, scenes: bool = True, photos: bool = False, votes: Sequence[Vote] = (), model: str = "a" * 64, **changes: Any
) -> tuple[dict[str, Any], list[Preference]]:
    """Statistics and rows of the step in `folder`."""
    document: dict[str, Any] = {
        "name": "test",
        "data": {"scenes": SCENES},
        "mmdit": {"stages": {"S1": {"resolution_px": 64}}},
        "preferences": {"num_pairs": 8, "num_sampled": 8, "tie_share": 0.2} | changes,
    }
    folder.mkdir()
    if votes:
        (folder / "votes.jsonl").write_bytes(b"".join(vote_line(vote) for vote in votes))
        document["preferences"]["votes"] = [str(folder / "votes.jsonl")]
    recipe = Recipe.model_validate(document)
    made = [scene_rows(recipe)] * scenes + [photo_rows()] * photos
    names = ("images", "edits", "captions", "vae", "encoder")
    inputs = {name: Input(folder / name) for name in names} | {"model": Input(folder / "model", model)}
    for place, name in enumerate(("images", "edits")):
        inputs[name].root.mkdir()
        write_rows(inputs[name].root, [row for part in made for row in part[place]])
    images = [row for part in made for row in part[0]]
    inputs["captions"].root.mkdir()
    table = pa.table({"sample_id": pa.array([row.sample_id for row in images], pa.binary(16)), "general": [row.caption for row in images]})
    pq.write_table(table, inputs["captions"].root / "captions.parquet")
    context: Any = SimpleNamespace(
        recipe=recipe,
        site=Site(workspace=str(folder)),
        inputs=inputs,
        output=folder,
        show=lambda *_known: None,
        say=lambda _line: None,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_preferences, "load_vae", lambda _folder: torch.nn.Identity())
        patch.setattr(build_preferences, "reconstruct", quantised)
        patch.setattr(build_preferences, "open_painter", lambda **known: Painter(None, None, None, known["sampling"]))  # type: ignore[arg-type]
        patch.setattr(sampled_pairs, "draw", paint)
        stats = build_preferences.run(context)
    return stats, list(read_preferences(folder / FILE_NAME))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Preference]]:
    return build(tmp_path_factory.mktemp("built") / "scenes")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[Preference]:
    return build(tmp_path_factory.mktemp("built") / "mixed", photos=True, num_pairs=100, num_sampled=20)[1]


def vote(pair: Preference, label: Any, annotator: str = "ann", **changes: Any) -> Vote:
    known = {"scores": None, "rubric_version": "1", "reason": None, "time": "2026-11-21T09:30:00+00:00"} | changes
    return Vote(pair_id=pair.pair_id, dimension=pair.dimension, label=label, annotator=annotator, **known)


def sampled(rows: Sequence[Preference]) -> list[Preference]:
    return [row for row in rows if row.model_a != "real"]


def test_every_dimension_has_its_pairs_and_what_models_drew_waits_for_people(built):
    stats, rows = built
    made = [row for row in rows if row.model_a == "real"]
    assert {name: sum(row.dimension == name for row in made) for name in DIMENSIONS} == dict.fromkeys(DIMENSIONS, 8)
    assert all(row.label in ("a", "b", "tie") for row in made)
    drawn = sampled(rows)
    assert len(drawn) == 2 * 8
    assert {row.label for row in drawn} == {"unlabelled"}
    assert {row.dimension for row in drawn if row.sources} == {"instruction_following", "visual_consistency"}
    assert {row.dimension for row in drawn if not row.sources} == {"aesthetics", "alignment"}
    assert all(row.seed_a != row.seed_b for row in drawn)
    assert stats["rows"] == len(rows)
    assert sum(num for of in stats["pairs"].values() for num in of["label"].values()) == len(rows)


def test_about_half_of_the_made_pairs_went_through_the_autoencoder_with_both_pictures_and_no_source(mixed):
    made = [row for row in mixed if row.model_a == "real"]
    through = [bool(row.notes.get("autoencoded")) for row in made]
    assert 0.4 < np.mean(through) < 0.6
    for row, expected in zip(made, through, strict=True):
        traces = [not (np.asarray(picture) % 4).any() for picture in row.pictures()]
        assert traces == [expected, expected]
        assert all((np.asarray(decode_image(source)) % 4).any() for source in row.sources)


def test_the_same_recipe_gives_the_same_bytes(tmp_path):
    for name in ("once", "again"):
        build(tmp_path / name, photos=True, num_pairs=4)
    files = [(tmp_path / name / FILE_NAME).read_bytes() for name in ("once", "again")]
    assert files[0] == files[1]


def test_photographs_alone_make_pairs_of_all_dimensions(tmp_path):
    _, rows = build(tmp_path / "photos", scenes=False, photos=True, num_pairs=20)
    captions = {f"blobs number {index}" for index in range(30)}
    for name in ("aesthetics", "alignment"):
        assert {row.prompt for row in rows if row.dimension == name} <= captions
    styled = [row for row in rows if row.dimension == "instruction_following" and row.model_a == "real"]
    assert {row.notes["operation"] for row in styled} == {"style", "restoration"}
    assert {row.pictures()[0].size for row in rows if row.dimension == "aesthetics"} == {(96, 64)}


def test_no_prompt_and_no_source_is_in_two_splits(mixed):
    splits = defaultdict(set)
    for row in mixed:
        splits["prompt", row.prompt].add(row.split)
        for source in row.sources:
            splits["source", source].add(row.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {row.split for row in mixed} == {"train", "validation", "test"}


def test_votes_label_the_pairs_that_they_name_when_the_step_is_run_again(built, tmp_path):
    _, rows = built
    first, second, known = *sampled(rows)[:2], next(row for row in rows if row.label == "a")
    gone = vote(first, "a")
    votes = [
        vote(first, "b", scores={"a": 2, "b": 5}),
        vote(first, "b", "bob", scores={"a": 1, "b": 4}),
        vote(second, "invalid", reason="blank"),
        vote(known, "b"),
        Vote(**{**gone.__dict__, "pair_id": "gone"}),
    ]
    stats, again = build(tmp_path / "again", votes=votes)
    by_id = {(row.pair_id, row.dimension): row for row in again}
    found = by_id[first.pair_id, first.dimension]
    assert (found.label, found.reason, found.votes, found.num_annotators) == ("b", "votes", {"b": 2}, 2)
    assert (found.score_a, found.score_b) == (1.5, 4.5)
    assert (found.image_a, found.image_b) == (first.image_a, first.image_b)
    assert by_id[second.pair_id, second.dimension].label == "invalid"
    assert by_id[known.pair_id, known.dimension].label == "b"
    assert by_id[known.pair_id, known.dimension].score_a == known.score_a
    assert stats["votes"] == {"pairs": 4, "used": 3, "of_pairs_that_are_gone": 1}
    assert any("gone" in warning for warning in stats["warnings"])


def test_more_sampled_pairs_keep_those_that_were_there(built, tmp_path):
    _, rows = built
    _, more = build(tmp_path / "more", num_pairs=1, num_sampled=14)
    before, after = ({(row.pair_id, row.dimension, row.image_a, row.image_b) for row in sampled(found)} for found in (rows, more))
    assert before < after
    assert len(after) == 2 * 14


def test_another_model_draws_other_pairs(built, tmp_path):
    _, rows = built
    _, others = build(tmp_path / "other", model="b" * 64, num_pairs=1)
    assert not {row.pair_id for row in sampled(rows)} & {row.pair_id for row in sampled(others)}


def test_bad_votes_stop_the_step_before_it_reads_a_picture(tmp_path):
    with pytest.raises(UserError, match="preferences.votes: .*nowhere.jsonl: no such file"):
        build_preferences.run(
            SimpleNamespace(  # type: ignore[arg-type]
                recipe=Recipe.model_validate(
                    {"name": "x", "mmdit": {"stages": {"S1": {}}}, "preferences": {"votes": [str(tmp_path / "nowhere.jsonl")]}}
                ),
                site=Site(workspace=str(tmp_path)),
            )
        )
