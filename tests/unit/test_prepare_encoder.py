"""prepare_encoder: the same captions give the same bytes, what is held out is not read, and given weights are taken."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from model_core.data.folders import LocalFolder
from model_core.data.latents import CAPTIONS
from model_core.data.shards import make_row, write_rows
from model_core.models.condition import load_encoder
from model_core.recipe import Recipe
from model_core.steps import prepare_encoder
from tests.interruptions import contents

WORDS = ("red", "blue", "zebra")
TINY = {"hidden_size": 32, "num_heads": 2, "num_layers": 1, "vocab_size": 400}


def inputs(folder: Path) -> dict[str, Any]:
    captions = [{name: f"a {word} circle, {name}" if name != "text" else "" for name in CAPTIONS} for word in WORDS[:2] for _ in range(9)]
    (folder / "captions").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(captions), folder / "captions" / "captions.parquet")
    rows = []
    for index in range(200):
        picture = Image.new("RGB", (16, 16), (index, 0, 0))
        row = make_row(
            picture,
            kind="edit",
            references=[picture],
            instruction="make it sepia",
            operation="style",
            caption="a circle",
            annotation="{}",
            provenance="test",
            licence="unknown",
        )
        rows.append(row)
    write_rows(folder / "edits", iter(rows))
    return {"captions": LocalFolder(folder / "captions"), "edits": LocalFolder(folder / "edits")}


def prepare(output: Path, given: dict[str, Any], **encoder: Any) -> dict[str, Any]:
    recipe = Recipe.model_validate({"name": "tiny", "encoder": TINY | encoder, "mmdit": {"stages": {"S1": {}}}})
    output.mkdir(parents=True)
    return prepare_encoder.run(SimpleNamespace(recipe=recipe, inputs=given, output=output))  # type: ignore[arg-type]


def test_the_same_captions_give_the_same_bytes_wherever_they_lie(tmp_path):
    given = inputs(tmp_path / "inputs")
    stats = [prepare(tmp_path / name, given) for name in ("one", "elsewhere/two")]
    first, second = contents(tmp_path / "one"), contents(tmp_path / "elsewhere/two")
    assert {"encoder/config.json", "encoder/model.safetensors", "encoder/tokenizer.json", "encoder/condition.json"} <= set(first)
    assert first == second
    assert stats[0]["parameters"] == stats[1]["parameters"] > 0


def test_frequent_words_of_captions_and_instructions_are_tokens(tmp_path):
    prepare(tmp_path / "made", inputs(tmp_path / "inputs"))
    tokenizer = load_encoder(tmp_path / "made" / "encoder").tokenizer
    for word in ("red", "blue", "circle", "sepia"):
        assert len(tokenizer.tokenize(f" {word}")) == 1, word
    assert len(tokenizer.tokenize(" zebra")) > 1


def test_given_weights_are_taken_as_they_are(tmp_path):
    given = inputs(tmp_path / "inputs")
    prepare(tmp_path / "made", given)
    prepare(tmp_path / "taken", given, path=str(tmp_path / "made" / "encoder"))
    made, taken = (load_encoder(tmp_path / name / "encoder") for name in ("made", "taken"))
    assert (made.encode_packed(["a red circle"]).states == taken.encode_packed(["a red circle"]).states).all()


def test_an_encoder_that_sees_images_has_read_how_they_are_named(tmp_path):
    given = inputs(tmp_path / "inputs")
    for sees_images in (False, True):
        prepare(tmp_path / str(sees_images), given, sees_images=sees_images)
        one = load_encoder(tmp_path / str(sees_images) / "encoder")
        assert one.sees_images == sees_images
        assert (len(one.token_ids("image")) == 1) == sees_images


def test_given_weights_keep_their_type(tmp_path):
    given = inputs(tmp_path / "inputs")
    prepare(tmp_path / "made", given)
    load_encoder(tmp_path / "made" / "encoder", dtype=torch.bfloat16).model.save_pretrained(tmp_path / "made" / "encoder")
    prepare(tmp_path / "taken", given, path=str(tmp_path / "made" / "encoder"))
    sizes = [(tmp_path / name / "encoder/model.safetensors").stat().st_size for name in ("made", "taken")]
    assert sizes[0] == sizes[1]
    assert load_encoder(tmp_path / "taken" / "encoder").model.dtype == torch.float32
