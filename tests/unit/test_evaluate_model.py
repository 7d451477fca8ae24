"""The evaluation with painters whose skill is known, in place of a trained model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from model_core.data.edits import edit_photo
from model_core.data.folders import LocalFolder
from model_core.data.keys import keyed_generator
from model_core.data.shards import make_row, write_rows
from model_core.data.synthetic import BACKGROUNDS, COLORS, SHAPES, Scene, describe, render, training_scenes
from model_core.evaluation.drawing import Request
from model_core.evaluation.edits import scene_edits
from model_core.recipe import Recipe, Scenes
from model_core.steps import evaluate_model

Paint = Callable[[Request], Image.Image]


class Input(LocalFolder):
    """An input folder as the step sees it."""

    manifest = SimpleNamespace(stage="S1")

    def folder(self, prefix: str) -> Path:
        return self.root / prefix


class Said:
    """A tracker and a progress that keep what they are told."""

    def __init__(self) -> None:
        self.scores: dict[str, float] = {}

    def metrics(self, values: dict[str, float], *, step: int) -> None:
        self.scores |= values

    def image(self, key: str, path: Path, step: int) -> None:
        assert path.exists()

    def say(self, message: str) -> None:
        pass


def paint_as_told(request: Request) -> Image.Image:
    """What a perfect model draws from the words of a plain prompt; edits are looked up by their instruction and source."""
    words = request.text.replace(" and ", " ").split()

    def named(values: Sequence[str], otherwise: str) -> str:
        return next((word for word in words if word in values), otherwise)

    text = next((word for word in words if len(word) == 2 and word[0].isupper() and word[1].isdigit()), "")
    scene = Scene(
        named(tuple(COLORS), "red"),
        named(SHAPES, "circle"),
        named(("left", "right", "top", "bottom"), "left"),
        named(tuple(BACKGROUNDS), "white"),
        text,
    )
    return render(scene, request.size_px[0], "painted", request.seed)


def photo(index: int) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((128, 80), Image.Resampling.BICUBIC)


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    config = Scenes(num_images=60)

    def run(paint: Paint, *, scenes: bool = True, photos: bool = False, output: str = "output") -> dict[str, Any]:
        rows, edits = [], []
        if scenes:
            pictures = [(scene, render(scene, 64, index)) for index, scene in enumerate(training_scenes(config, seed=0))]
            rows += [make_row(picture, kind="image", caption=describe(scene, 0), annotation=scene.to_json()) for scene, picture in pictures]
            for edit in scene_edits(7, ("attribute", "style", "text"), config, seed=3):
                known = {"instruction": edit.instruction, "operation": edit.notes["operation"], "annotation": json.dumps(edit.notes)}
                edits.append(make_row(edit.target, kind="edit", references=edit.references, **known))
        if photos:
            for index in range(60):
                rows.append(make_row(photo(index), kind="image", caption=f"blobs number {index}"))
                edit = edit_photo("style", photo(index), "blobs", keyed_generator(index), second=None)
                assert edit is not None
                known = {"instruction": edit.instruction, "operation": "style", "annotation": json.dumps(edit.notes)}
                edits.append(make_row(edit.target, kind="edit", references=edit.references, **known))
        inputs = {name: Input(tmp_path / output / name) for name in ("model", "vae", "encoder", "captions", "images", "edits")}
        for name, members in (("images", rows), ("edits", edits)):
            inputs[name].root.mkdir(parents=True)
            write_rows(inputs[name].root, members)
        inputs["captions"].root.mkdir()
        table = pa.table({"sample_id": pa.array([row.sample_id for row in rows], pa.binary(16)), "general": [row.caption for row in rows]})
        pq.write_table(table, inputs["captions"].root / "captions.parquet")
        recipe = Recipe.model_validate(
            {
                "name": "test",
                "mmdit": {"stages": {"S1": {"resolution_px": 64}}},
                "evaluation": {"num_prompts": 16, "num_edits": 6, "num_reconstructions": 6, "grid_prompts": 4},
            }
        )
        painter = SimpleNamespace(vae=None, encoder=SimpleNamespace(multiple_px=16))
        monkeypatch.setattr(evaluate_model, "open_painter", lambda **_: painter)
        monkeypatch.setattr(evaluate_model, "reconstruct", lambda vae, pictures: [picture.copy() for picture in pictures])
        monkeypatch.setattr(evaluate_model, "draw", lambda painter, requests, *, on_drawn: [paint(request) for request in requests])
        folder = tmp_path / output / "result"
        folder.mkdir()
        said = Said()
        context = SimpleNamespace(recipe=recipe, inputs=inputs, output=folder, tracker=said, progress=said, run="r", key="k", stage=None)
        evaluate_model.run(context)  # type: ignore[arg-type]
        documents = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
        assert said.scores == documents["scores"]
        named = [
            entry[key]
            for entry in (*documents["prompts"], *documents["edits"])
            for key in ("image", "original", "result", "target")
            if key in entry
        ]
        assert all((folder / name).exists() for name in named)
        return documents

    return run


def test_a_painter_that_does_as_told_has_full_marks(evaluate):
    found = evaluate(paint_as_told)
    scores = found["scores"]
    assert [scores[f"judge/{name}"] for name in ("color", "shape", "position", "text", "background", "mean", "all")] == [1.0] * 7
    assert scores["vae/psnr"] == 100.0
    assert scores["vae/ssim"] == 1.0
    assert scores["judge_check/after_vae"] >= 0.98
    assert 0.0 <= scores["edit/success"] < 1.0
    assert scores["hard/words"] == 0.0
    assert [entry["shown"] for entry in found["prompts"] if entry["group"] == "plain"] == [True] * 4 + [False] * 12
    assert found["warnings"] == []


def test_a_painter_that_always_draws_the_same_has_low_marks(evaluate):
    scores = evaluate(lambda request: render(Scene("red", "circle", "left", "white", "A7"), 64, "same"))["scores"]
    assert scores["judge/mean"] < 0.5
    assert scores["judge/text"] == 0.0
    assert scores["judge/all"] == 0.0


def test_photographs_alone_are_drawn_and_measured_but_not_judged(evaluate):
    found = evaluate(lambda request: photo(request.seed).resize(request.size_px[::-1]), scenes=False, photos=True)
    assert not [name for name in found["scores"] if name.startswith(("judge", "edit", "hard"))]
    assert {"vae/psnr", "vae/ssim", "photo_edit/psnr_gain"} <= set(found["scores"])
    assert "no plain scenes" in found["warnings"][0]
    assert found["prompts"]
    assert {entry["group"] for entry in found["prompts"]} == {"captions"}
    assert all("original" in entry for entry in found["prompts"])


def test_equal_inputs_give_equal_files(evaluate, tmp_path):
    for output in ("first", "second"):
        evaluate(paint_as_told, output=output)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first" / "result").rglob("*") if path.is_file())
    assert files
    assert all((tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes() for name in files)


def test_a_judge_that_cannot_read_clean_renders_stops_the_step(evaluate, monkeypatch):
    monkeypatch.setattr(evaluate_model.Judge, "validate", lambda self, num, *, seed: {"color": 1.0, "text": 0.9})
    with pytest.raises(RuntimeError, match=r"0\.9"):
        evaluate(paint_as_told)
