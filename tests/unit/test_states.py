"""Text states beside latents: what is stored for whom, that it reads back, and that shards without any stay what they were."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import duckdb
import pyarrow.parquet as pq
import pytest
import torch

from model_core.data.folders import LocalFolder
from model_core.data.index import read_index
from model_core.data.latents import CAPTIONS, LatentGroup, LatentWriter, Origin, latent_group, open_latents, states_by_kind
from model_core.data.pixels import image_tensor
from model_core.data.row_groups import RowGroups
from model_core.data.states import EMPTY, read_empty
from model_core.documents import UserError
from model_core.models.condition import ConditionEncoder, load_encoder
from model_core.steps import encode_latents
from tests.encoded_inputs import Input, write_inputs, write_stage
from tests.latent_sets import CHANNELS, ORIGIN, row, write_latents
from tests.tiny_encoders import PROMPTS, encoder

EVERY = {"image": CAPTIONS, "edit": ("instruction", EMPTY)}


def test_what_is_stored_follows_from_stage_and_encoder():
    kinds = ("image", "text_image", "edit")
    assert states_by_kind(kinds, cache_states=False, sees_images=False) == {}
    assert states_by_kind(kinds, cache_states=False, sees_images=True) == {"edit": ("instruction", EMPTY)}
    cached = {"image": CAPTIONS, "text_image": CAPTIONS}
    assert states_by_kind(kinds, cache_states=True, sees_images=False) == {**cached, "edit": ("instruction",)}
    assert states_by_kind(kinds, cache_states=True, sees_images=True) == {**cached, "edit": ("instruction", EMPTY)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Input]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def encode(inputs, tmp_path_factory) -> Callable[..., Path]:
    """What encode_latents leaves of them, for each encoder and stage made once."""

    @functools.cache
    def made(*, sees_images: bool, cache_states: bool) -> Path:
        return write_stage(inputs, tmp_path_factory.mktemp("latents"), sees_images=sees_images, cache_states=cache_states)

    return made


def read(root: Path) -> list[LatentGroup]:
    index = read_index(LocalFolder(root))
    groups = RowGroups(LocalFolder(root), index, latent_group, capacity=99, say=print)
    return [group for number in range(len(index)) if (group := groups.get(number)) is not None]


def as_stored(encoder: ConditionEncoder, prompt: str, references: list[torch.Tensor]) -> torch.Tensor:
    return encoder.encode_packed([prompt], [references]).states.bfloat16()


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal up to a rounding of bfloat16, which another batch may tip."""
    return found.dtype == torch.bfloat16 and torch.allclose(found.float(), wanted.float(), rtol=2**-7, atol=1e-4)


def test_an_encoder_that_sees_images_leaves_the_states_of_each_edit_with_and_without_its_prompt(inputs, encode):
    groups = read(encode(sees_images=True, cache_states=False))
    one = load_encoder(inputs["encoder-True"].folder("encoder"))
    raw = {row.sample_id: row for row in encode_latents.read_kept_rows(inputs["kept"], inputs, kinds=["edit"])}
    seen = 0
    for group in groups:
        assert set(group.states) == ({"instruction", EMPTY} if group.bucket.kind == "edit" else set())
        assert group.bucket.height % 2 == group.bucket.width % 2 == 0
        for number, sample_id in enumerate(group.sample_ids if group.states else []):
            shape_px = (16 * group.bucket.height, 16 * group.bucket.width)
            edit = raw[sample_id]
            references = [image_tensor(encode_latents.fit(encode_latents.decode_image(image), shape_px)) for image in edit.references]
            for name, prompt in (("instruction", edit.instruction), (EMPTY, "")):
                found = group.states[name].row(number)
                assert close(found.states, as_stored(one, prompt, references))
                assert len(found.runs) == group.bucket.num_references + 1
                assert found.runs == tuple(one.encode_packed([prompt], [references]).segments[0][::2])
            assert group.prompt_tokens["instruction"][number] == len(group.states["instruction"].row(number).states)
            seen += 1
    assert seen == 5
    assert {(group.bucket.height, group.bucket.width) for group in groups} == {(4, 4), (4, 6)}


def test_a_stage_that_caches_states_leaves_those_of_every_prompt_that_there_is(inputs, encode):
    root = encode(sees_images=False, cache_states=True)
    groups = read(root)
    one = load_encoder(inputs["encoder-False"].folder("encoder"))
    without = 0
    for group in groups:
        names = ("instruction",) if group.bucket.kind == "edit" else CAPTIONS
        assert tuple(group.states) == names
        for number in range(len(group)):
            for name in names:
                found, prompt = group.states[name].row(number), group.prompts[name][number]
                without += not prompt
                assert close(found.states, as_stored(one, prompt, []) if prompt else torch.zeros(0, one.dim, dtype=torch.bfloat16))
                assert found.runs == (len(found.states),)
    assert without == 1
    empty = read_empty(LocalFolder(root))
    assert close(empty.states, as_stored(one, "", []))
    assert empty.runs == (one.num_tokens(""),)


def test_shards_without_states_keep_format_and_columns(encode):
    root = encode(sees_images=False, cache_states=False)
    assert not (root / "empty.safetensors").exists()
    for path in (root / "latents").rglob("*.parquet"):
        schema = pq.read_schema(path)
        assert schema.metadata[b"format"] == b"darkroom-latents-2"
        assert not [name for name in schema.names if "states" in name or "runs" in name]
        assert set(schema.metadata) == {b"format", b"bucket", b"channels", b"vae", b"encoder"}


def test_a_stage_that_needs_states_refuses_latents_without_them(inputs, encode, tmp_path):
    write_latents(tmp_path / "old", {"image": 2, "edit": 2})
    folder = LocalFolder(tmp_path / "old")
    open_latents(folder, origin=ORIGIN)
    with pytest.raises(UserError, match=r"train/edit/.*: found no text states of empty, instruction; this stage trains on stored ones"):
        open_latents(folder, origin=ORIGIN, states={"edit": ("instruction", EMPTY)})
    with pytest.raises(UserError, match="found no text states of general, knowledge, structured, text"):
        open_latents(folder, origin=ORIGIN, states={"image": CAPTIONS})
    folder = LocalFolder(encode(sees_images=True, cache_states=False))
    origin = Origin(None, inputs["encoder-True"].manifest.content_digest)
    open_latents(folder, origin=origin, states={"edit": ("instruction", EMPTY)})
    with pytest.raises(UserError, match=r"/image/.*found no text states of general"):
        open_latents(folder, origin=origin, states=EVERY)


def test_duckdb_shows_the_documented_columns_of_states(encode):
    root = encode(sees_images=True, cache_states=True)
    (path,) = (root / "latents/train/edit/4x4-r2").rglob("*.parquet")
    described = {name: kind for name, kind, *_ in duckdb.sql(f"describe select * from read_parquet('{path}')").fetchall()}
    assert {name: kind for name, kind in described.items() if "_states" in name or "_runs" in name} == {
        "instruction_states": "BLOB",
        "instruction_runs": "SMALLINT[]",
        "empty_states": "BLOB",
        "empty_runs": "SMALLINT[]",
    }
    ((states, tokens, runs),) = duckdb.sql(
        f"select octet_length(instruction_states), instruction_tokens, instruction_runs from read_parquet('{path}')"
    ).fetchall()
    assert states == 2 * 32 * tokens == 2 * 32 * sum(runs)


def test_a_row_group_ends_at_its_size_with_states_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("model_core.data.latents.ROW_GROUP_BYTES", 4 * 1000)
    states = encoder().encode_packed([PROMPTS[0]])
    stored = {"general": SimpleNamespace(states=states.states, runs=tuple(states.lengths))}
    writer = LatentWriter(tmp_path, origin=ORIGIN, channels=CHANNELS, states={"image": ("general",)}, text_dim=32)
    bucket = encode_latents.Bucket("train", "image", 2, 3, 0)
    for number in range(9):
        plain = row("image", number)
        writer.add(bucket, encode_latents.LatentRow(**{**vars(plain), "states": stored}))
    size = 2 * CHANNELS * 6 + 2 * states.states.numel()
    assert writer.close().rows.tolist()[0] == 4000 // size < 9
