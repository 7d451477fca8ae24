"""The index of a data set: what it says of shards against the parquet library, and versions that only grow."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model_core.data.folders import LocalFolder
from model_core.data.index import FORMAT, append_version, read_index, sum_ids, write_index
from model_core.data.latents import CAPTIONS, HELD_OUT, PROMPTS, TRAIN, Origin, floats, latent_group, latent_rows, open_latents
from model_core.data.shard_writer import ShardWriter
from model_core.documents import UserError
from model_core.storage import open_storage
from tests.latent_sets import CHANNELS, ORIGIN, row, sample_id, write_latents

SCHEMA = pa.schema([("sample_id", pa.binary(16)), ("value", pa.int64())])


def numbered(first: int, count: int) -> pa.Table:
    ids = [sample_id("row", number) for number in range(first, first + count)]
    return pa.table({"sample_id": pa.array(ids, pa.binary(16)), "value": list(range(first, first + count))}, schema=SCHEMA)


def groups(root, *counts: int, bucket="b"):
    writer = ShardWriter(root, "shards", SCHEMA, bucket=bucket)
    for number, count in enumerate(counts):
        writer.write(numbered(100 * number, count), 8 * count)
    return writer.close()


def test_every_entry_names_bytes_that_hold_just_its_rows(tmp_path):
    index = write_index(tmp_path, groups(tmp_path, 3, 5, 2))
    assert index.rows.tolist() == [3, 5, 2]
    for number in range(3):
        entry = index[number]
        data = (tmp_path / entry.path).read_bytes()
        assert hashlib.sha256(data[entry.offset : entry.offset + entry.length]).digest() == entry.sha256
        table = pq.ParquetFile(tmp_path / entry.path).read_row_group(entry.row_group)
        assert table["value"].to_pylist() == list(range(100 * number, 100 * number + entry.rows))
        assert entry.id_sum == sum_ids(table["sample_id"].to_pylist())
        assert data.endswith(index.footer(entry.path))
    assert pq.read_metadata(pa.BufferReader(index.footer(index.paths[0]))).num_rows == 10


def test_equal_content_gives_equal_bytes_and_names(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_index(tmp_path / name, groups(tmp_path / name, 3, 5))
    files = [{path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in ("a", "b")]
    assert files[0] == files[1]
    assert len(files[0]) == 3


def test_shards_end_at_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr("model_core.data.shard_writer.SHARD_BYTES", 40)
    index = write_index(tmp_path, groups(tmp_path, 3, 3, 3, 3))
    assert len(index.paths) == 2
    assert [index[number].row_group for number in range(4)] == [0, 1, 0, 1]


def test_a_new_version_lists_the_old_row_groups_and_the_new_and_the_old_one_stays(tmp_path):
    first = write_index(tmp_path, groups(tmp_path, 3))
    second = append_version(open_storage(tmp_path.as_uri()), groups(tmp_path, 1, 4))
    folder = LocalFolder(tmp_path)
    assert read_index(folder).digest == second.digest != first.digest
    assert (read_index(folder).version, read_index(folder).rows.tolist()) == (1, [3, 1, 4])
    assert read_index(folder, version=0).digest == first.digest
    with pytest.raises(UserError, match="found no version 2; allowed are 0 to 1"):
        read_index(folder, version=2)


def test_writers_that_append_at_once_lose_nothing(tmp_path):
    write_index(tmp_path, groups(tmp_path, 2))
    parts = [groups(tmp_path, number) for number in range(3, 9)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda part: append_version(open_storage(tmp_path.as_uri()), part), parts))
    index = read_index(LocalFolder(tmp_path))
    assert index.version == 6
    assert sorted(index.rows.tolist()) == [2, 3, 4, 5, 6, 7, 8]


def test_a_version_whose_writer_died_before_moving_the_pointer_is_kept(tmp_path):
    write_index(tmp_path, groups(tmp_path, 2))
    pointer = (tmp_path / "index.json").read_bytes()
    append_version(open_storage(tmp_path.as_uri()), groups(tmp_path, 3))
    (tmp_path / "index.json").write_bytes(pointer)
    assert append_version(open_storage(tmp_path.as_uri()), groups(tmp_path, 4)).rows.tolist() == [2, 3, 4]


def test_a_changed_index_and_another_format_are_refused(tmp_path):
    write_index(tmp_path, groups(tmp_path, 2))
    pointer = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**pointer, "sha256": "0" * 64}))
    with pytest.raises(UserError, match=r"index-00000.parquet: changed since it was written"):
        read_index(LocalFolder(tmp_path))
    (tmp_path / "index.json").write_text(json.dumps({**pointer, "format": "x"}))
    with pytest.raises(UserError, match=f"found index format 'x'; allowed is '{FORMAT}'"):
        read_index(LocalFolder(tmp_path))


def test_latents_read_back_as_they_were_written_up_to_bfloat16(tmp_path):
    index = write_latents(tmp_path, {"edit": 5})
    for number in range(len(index)):
        entry = index[number]
        group = latent_group(pq.ParquetFile(tmp_path / entry.path).read_row_group(entry.row_group), entry.path)
        for place, found in enumerate(group.sample_ids):
            written = row("edit", int.from_bytes(found[8:], "big"), num_references=1)
            assert found == written.sample_id
            assert floats(group.latents[place]).equal(written.latent.bfloat16().float())
            assert floats(group.references[place, 0]).equal(written.references[0].bfloat16().float())
            assert {name: group.prompts[name][place] for name in PROMPTS} == written.prompts
            assert {name: group.prompt_tokens[name][place] for name in PROMPTS} == written.prompt_tokens
    assert len(group.references[0]) == 1


def test_rows_lie_in_the_buckets_of_their_split_kind_and_shape(tmp_path):
    index = write_latents(tmp_path, {"image": 8, "edit": 4}, shapes=((2, 3), (3, 2)), held_out=2)
    assert index.buckets == [
        f"{split}/{kind}/{shape}"
        for split in (HELD_OUT, TRAIN)
        for kind, shape in (("edit", "2x3-r1"), ("edit", "3x2-r1"), ("image", "2x3-r0"), ("image", "3x2-r0"))
    ]
    assert {kind: rows.total for kind, rows in latent_rows(index, kinds=("image", "edit")).items()} == {"image": 6, "edit": 2}
    assert latent_rows(index, kinds=("image",), split=HELD_OUT)["image"].total == 2


def test_latents_of_another_encoder_or_vae_are_refused_and_what_made_them_is_told(tmp_path):
    write_latents(tmp_path, {"image": 2})
    assert open_latents(LocalFolder(tmp_path), origin=Origin(None, ORIGIN.encoder))[1:] == (ORIGIN, CHANNELS)
    with pytest.raises(UserError, match="made with condition encoder bbbbbbbbbbbb; allowed here is cccccccccccc"):
        open_latents(LocalFolder(tmp_path), origin=Origin(None, "c" * 64))
    with pytest.raises(UserError, match="made with VAE aaaaaaaaaaaa; allowed here is cccccccccccc"):
        open_latents(LocalFolder(tmp_path), origin=Origin("c" * 64, ORIGIN.encoder))


def test_shards_of_two_vaes_are_no_data_set(tmp_path):
    first, second = (
        write_latents(tmp_path, {kind: 2}, origin=Origin(vae * 64, ORIGIN.encoder)) for kind, vae in (("image", "a"), ("edit", "c"))
    )
    write_index(tmp_path, [index[number] for index in (first, second) for number in range(len(index))])
    with pytest.raises(UserError, match=r"train/edit/.*made with VAE cccccccccccc; allowed here is aaaaaaaaaaaa"):
        open_latents(LocalFolder(tmp_path), origin=Origin(None, ORIGIN.encoder))


def test_duckdb_and_pyarrow_show_the_documented_columns(tmp_path):
    write_latents(tmp_path, {"image": 3, "edit": 3})
    path = next((tmp_path / "latents/train/edit").rglob("*.parquet"))
    described = duckdb.sql(f"describe select * from read_parquet('{path}')").fetchall()
    prompts = [(name, "VARCHAR") for name in ("instruction", *CAPTIONS)]
    lengths = [(f"{name}_tokens", "SMALLINT") for name in ("instruction", *CAPTIONS)]
    assert [entry[:2] for entry in described] == [("sample_id", "BLOB"), ("latent", "BLOB"), ("references", "BLOB"), *prompts, *lengths]
    rows = duckdb.sql(f"select octet_length(latent), instruction, sample_id from read_parquet('{path}') order by sample_id").fetchall()
    assert rows == [(2 * CHANNELS * 6, f"change {number}", sample_id("edit", number)) for number in range(3)]
    assert pq.read_schema(path).metadata[b"vae"].decode() == ORIGIN.vae
    every = duckdb.sql(f"select count(*) from read_parquet('{tmp_path}/latents/*/*/*/*.parquet', union_by_name=true)").fetchall()
    assert every == [(6,)]
