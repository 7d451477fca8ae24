"""The data steps one after another on scenes and photographs: counts, purity, and that nothing held out or repeated slips through."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from model_core.context import StepContext
from model_core.data.folders import LocalFolder
from model_core.data.shards import read_rows
from model_core.data.synthetic import PHOTO, is_held_out, scene_from_dict
from model_core.documents import UserError
from model_core.progress import Progress
from model_core.recipe import Recipe
from model_core.site import Site
from model_core.steps import build_edits, caption_images, filter_images, ingest_images, render_text
from model_core.storage import open_storage
from model_core.tracking.spool import open_tracker
from model_core.training.checkpoint import CheckpointStore

STEPS = {"images": ingest_images, "text_images": render_text, "edits": build_edits, "kept": filter_images, "captions": caption_images}
RAW = ("images", "text_images", "edits")


class Made(LocalFolder):
    """The result of a step, as an input of the next."""

    def __init__(self, root: Path, stats: dict[str, Any]) -> None:
        super().__init__(root)
        object.__setattr__(self, "manifest", SimpleNamespace(stats=stats))


def recipe(photos: Path | None, **changes: Any) -> Recipe:
    document: dict[str, Any] = {
        "name": "tiny",
        "data": {"sources": ["synthetic://scenes"], "scenes": {"num_images": 70}},
        "text_images": {"num_images": 12},
        "edits": {"num_pairs": 63},
        "mmdit": {"stages": {"S1": {}, "S6": {"filter": {"keep_share": 0.5}}}},
    }
    if photos is not None:
        document["data"]["sources"].append(photos.as_uri())
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        node = document
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return Recipe.model_validate(document)


def do(step: str, wish: Recipe, folder: Path, inputs: Mapping[str, Made], *, stage: str | None = None) -> Made:
    output = folder / (step if stage in (None, "S1") else f"{step}-{stage}")
    output.mkdir(parents=True)
    context = StepContext(
        recipe=wish,
        site=Site(workspace=str(folder)),
        stage=stage,
        run="test",
        key="0" * 16,
        inputs=inputs,  # type: ignore[arg-type]
        output=output,
        scratch=folder / "scratch",
        checkpoints=CheckpointStore(open_storage(folder.as_uri()), "checkpoints", say=print, scratch=folder / "scratch"),
        tracker=open_tracker(folder / "spool", run="test", step=step, stage=stage, key="0" * 16, experiment="test"),
        progress=Progress(step),
    )
    return Made(output, STEPS[step].run(context))


def line(wish: Recipe, folder: Path) -> dict[str, Made]:
    made: dict[str, Made] = {"images": do("images", wish, folder, {})}
    made["text_images"] = do("text_images", wish, folder, {"images": made["images"]})
    made["edits"] = do("edits", wish, folder, {"images": made["images"]})
    made["kept"] = do("kept", wish, folder, {name: made[name] for name in RAW}, stage="S1")
    made["captions"] = do("captions", wish, folder, {name: made[name] for name in (*RAW, "kept")})
    return made


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(12):
        small = np.random.default_rng(index).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(small).resize((90, 60), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a photograph of cloud {index}")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    (folder / "broken.txt").write_text("broken")
    return folder


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    return line(recipe(photos), tmp_path_factory.mktemp("line"))


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()
    }


def test_the_same_recipe_gives_the_same_bytes_wherever_it_runs(photos, made, tmp_path):
    again = line(recipe(photos), tmp_path / "elsewhere")
    for name, folder in made.items():
        assert files(folder.root) == files(again[name].root), name


def test_no_result_names_a_place_on_this_machine(photos, made):
    for folder in made.values():
        for path in folder.root.rglob("*"):
            if path.is_file():
                assert str(photos.parent).encode() not in path.read_bytes()


def test_pictures_of_all_sources_are_taken_and_what_is_broken_is_counted(made):
    stats = made["images"].manifest.stats
    assert 70 < stats["rows"] <= 82
    assert stats["skipped"]["cannot be decoded"] == 1
    assert any("broken.jpg" in warning for warning in stats["warnings"])
    assert {row.provenance.split("/")[0] for row in read_rows(made["images"])} >= {"synthetic:"}


def test_nothing_held_out_is_drawn_anywhere(made):
    for row in read_rows(made["images"]):
        if "shape" in (notes := row.notes()):
            assert not is_held_out(scene_from_dict(notes), 0.1)
    for row in read_rows(made["edits"]):
        for name in ("source", "target"):
            if scene := row.notes()[name]:
                assert not is_held_out(scene_from_dict(scene), 0.1)


def test_held_out_pictures_are_no_source_of_an_edit_or_a_sign(made):
    held_out = {row.provenance for row in read_rows(made["images"]) if row.held_out}
    assert held_out
    for name in ("edits", "text_images"):
        assert not any(row.provenance.endswith(tuple(held_out)) for row in read_rows(made[name]))


def test_edits_come_from_scenes_and_photographs_and_every_operation_has_its_turn(made):
    rows = list(read_rows(made["edits"]))
    assert len(rows) == made["edits"].manifest.stats["rows"] >= 58
    assert {row.operation for row in rows} == set(recipe(None).edits.operations)
    assert {row.notes()["source"] is None for row in rows} == {True, False}
    assert all(row.instruction and row.references for row in rows)


def test_ids_are_unique_over_all_inputs(made):
    ids = [row.sample_id for name in RAW for row in read_rows(made[name])]
    assert len(set(ids)) == len(ids)


def test_every_kept_row_has_captions(made):
    kept = pq.read_table(made["kept"].path("kept.parquet"))
    captions = pq.read_table(made["captions"].path("captions.parquet"))
    assert sorted(kept["sample_id"].to_pylist()) == sorted(captions["sample_id"].to_pylist())
    assert made["kept"].manifest.stats["kinds"] == {kind: kept["kind"].to_pylist().count(kind) for kind in ("edit", "image", "text_image")}
    assert set(kept["input"].to_pylist()) == set(RAW)


def test_a_later_stage_narrows_the_one_before_and_looks_at_no_picture_again(photos, made, tmp_path):
    later = do("kept", recipe(photos), tmp_path, {name: made[name] for name in RAW} | {"previous": made["kept"]}, stage="S6")
    before, after = (set(pq.read_table(folder.path("kept.parquet"))["sample_id"].to_pylist()) for folder in (made["kept"], later))
    assert after < before
    assert not later.manifest.stats["scored"]
    assert 0.3 < len(after) / len(before) < 0.7


def test_a_later_stage_that_asks_for_more_scores_again_what_was_kept(photos, made, tmp_path):
    wish = recipe(photos, mmdit__stages__S6__filter={"dedup_distance": 6})
    later = do("kept", wish, tmp_path, {name: made[name] for name in RAW} | {"previous": made["kept"]}, stage="S6")
    assert later.manifest.stats["scored"]
    assert later.manifest.stats["rows"] <= made["kept"].manifest.stats["rows"]
    assert pq.read_table(later.path("kept.parquet")).schema.metadata[b"dedup_distance"] == b"6"


def test_a_filter_that_leaves_nothing_says_what_took_the_rows(photos, made, tmp_path):
    wish = recipe(photos, mmdit__stages__S1__filter={"min_entropy_bits": 8.0})
    with pytest.raises(UserError, match=r"mmdit.stages.S1.filter: found no row that passes .*resolution \d+.*entropy 0"):
        do("kept", wish, tmp_path, {name: made[name] for name in RAW}, stage="S1")


def test_max_images_stops_early(photos, tmp_path):
    assert do("images", recipe(photos, data__max_images=20), tmp_path, {}).manifest.stats["rows"] == 20


def test_scenes_over_photographs_are_drawn_when_asked_for(photos, tmp_path):
    scenes = {"num_images": 30, "photo_background_share": 0.5}
    images = do("images", recipe(photos, data__scenes=scenes), tmp_path, {})
    backgrounds = [row.notes().get("background") for row in read_rows(images) if "shape" in row.notes()]
    assert 5 <= backgrounds.count(PHOTO) <= 25
    edits = do("edits", recipe(photos, data__scenes=scenes), tmp_path, {"images": images})
    assert all((row.notes()["source"] or {}).get("background") != PHOTO for row in read_rows(edits))
    of_scenes = [row for row in read_rows(edits) if row.notes()["source"] is None and "synthetic://" in row.provenance]
    assert of_scenes
    assert {(row.width, row.height) for row in of_scenes} == {(64, 64)}  # whole: nothing that the caption names is cut off


def test_none_of_a_kind_is_an_empty_set(photos, tmp_path):
    wish = recipe(None, text_images__num_images=0, edits__num_pairs=0, data__scenes={"num_images": 8})
    made = line(wish, tmp_path)
    assert made["kept"].manifest.stats["kinds"] == {"image": 8}
    assert json.loads((made["edits"].root / "index.json").read_text())["rows"] == 0
