"""Raw shards: what is written comes back, equal rows give equal bytes, and damage is found."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from model_core.data.folders import LocalFolder
from model_core.data.index import read_index
from model_core.data.shards import (
    FORMAT,
    RawRow,
    decode_image,
    draw_rows,
    make_row,
    read_kept_rows,
    read_rows,
    spread_rows,
    unique_rows,
    write_rows,
)
from model_core.data.skipped import Skipped
from model_core.documents import UserError


def picture(index: int) -> Image.Image:
    return Image.new("RGB", (20, 16), (index % 256, index // 256, 7))


def shard(root: Path) -> Path:
    """The one shard of a folder."""
    (path,) = (root / "shards").iterdir()
    return path


def rows(num: int) -> list[RawRow]:
    return [make_row(picture(index), kind="image", caption=f"picture {index}", provenance=f"p/{index}") for index in range(num)]


def test_rows_come_back_as_they_were_written(tmp_path):
    edit = make_row(picture(1), kind="edit", references=[picture(2), picture(3)], instruction="make it blue", operation="attribute")
    written = [*rows(3), edit]
    assert write_rows(tmp_path, written) == 4
    assert list(read_rows(LocalFolder(tmp_path))) == written
    assert decode_image(edit.references[1]).tobytes() == picture(3).tobytes()


def test_equal_rows_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name, rows(5))
    names = [sorted(path.name for path in (tmp_path / name / "shards").iterdir()) for name in ("a", "b")]
    assert names[0] == names[1]
    assert shard(tmp_path / "a").read_bytes() == shard(tmp_path / "b").read_bytes()


def test_rows_are_split_into_row_groups_and_shards_by_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("model_core.data.shards.ROW_GROUP_BYTES", 300)
    monkeypatch.setattr("model_core.data.shard_writer.SHARD_BYTES", 1000)
    written = rows(40)
    write_rows(tmp_path, written)
    index = read_index(LocalFolder(tmp_path))
    assert len(index.paths) > 1
    assert index.num_rows == 40
    assert pq.ParquetFile(tmp_path / index.paths[0]).num_row_groups > 1
    assert list(read_rows(LocalFolder(tmp_path))) == written


def test_an_empty_set_is_an_empty_index(tmp_path):
    assert write_rows(tmp_path, []) == 0
    assert list(read_rows(LocalFolder(tmp_path))) == []


def test_chosen_columns_leave_the_others_at_their_defaults(tmp_path):
    write_rows(tmp_path, rows(2))
    (first, _) = read_rows(LocalFolder(tmp_path), columns=("sample_id", "caption"))
    assert first.caption == "picture 0"
    assert first.image == b""


def test_files_carry_page_checksums_and_a_flipped_byte_is_found(tmp_path):
    write_rows(tmp_path, rows(4))
    file = shard(tmp_path)
    data = bytearray(file.read_bytes())
    place = data.index(b"\x89PNG") + 30
    data[place] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(OSError, match="(?i)crc"):
        list(read_rows(LocalFolder(tmp_path)))


def test_another_format_is_refused(tmp_path):
    write_rows(tmp_path, rows(1))
    file = shard(tmp_path)
    table = pq.read_table(file)
    assert table.schema.metadata[b"format"] == FORMAT
    pq.write_table(table.replace_schema_metadata({"format": "darkroom-raw-0"}), file)
    with pytest.raises(UserError, match="found shard format b'darkroom-raw-0'"):
        list(read_rows(LocalFolder(tmp_path)))


def test_ids_depend_on_picture_words_and_references():
    variants = [
        make_row(picture(0), kind="image", caption="a"),
        make_row(picture(1), kind="image", caption="a"),
        make_row(picture(0), kind="image", caption="b"),
        make_row(picture(0), kind="edit", caption="a", instruction="b"),
        make_row(picture(0), kind="edit", caption="a", references=[picture(1)]),
    ]
    assert len({row.sample_id for row in variants}) == 5
    assert variants[0] == make_row(picture(0), kind="image", caption="a")


def test_about_one_row_in_twenty_is_held_out():
    held_out = sum(row.held_out for row in rows(600))
    assert 10 <= held_out <= 60


def test_a_row_that_comes_twice_is_kept_once_and_counted():
    repeated = Skipped()
    assert len(list(unique_rows([*rows(3), *rows(4)], repeated))) == 4
    assert sum(repeated.counts.values()) == 3


def test_spread_rows_reach_from_the_first_to_near_the_last(tmp_path):
    write_rows(tmp_path, rows(100))
    found = [row.caption for row in spread_rows(LocalFolder(tmp_path), 10)]
    assert found == [f"picture {index}" for index in range(0, 100, 10)]
    assert len(spread_rows(LocalFolder(tmp_path), 1000)) == 100


def test_drawn_rows_do_not_depend_on_the_order_they_come_in():
    some = rows(50)
    assert draw_rows(some, 7, "key") == draw_rows(reversed(some), 7, "key")
    assert draw_rows(some, 7, "key") != draw_rows(some, 7, "other")
    assert len(draw_rows(some, 100, "key")) == 50


def test_kept_rows_are_those_listed_of_the_kinds_asked_for(tmp_path):
    images, texts = rows(4), [make_row(picture(9), kind="text_image", caption="t")]
    for name, part in (("images", images), ("text_images", texts), ("kept", [])):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name, part)
    listed = [(images[1], "images"), (images[3], "images"), (texts[0], "text_images")]
    table = {
        "sample_id": [row.sample_id for row, _ in listed],
        "kind": [row.kind for row, _ in listed],
        "input": [name for _, name in listed],
    }
    pq.write_table(pa.table(table), tmp_path / "kept/kept.parquet")
    kept, inputs = LocalFolder(tmp_path / "kept"), {name: LocalFolder(tmp_path / name) for name in ("images", "text_images")}
    assert list(read_kept_rows(kept, inputs)) == [images[1], images[3], texts[0]]
    assert list(read_kept_rows(kept, inputs, kinds=["text_image"])) == texts
    assert [row.image for row in read_kept_rows(kept, inputs, kinds=["image"], columns=("sample_id",))] == [b"", b""]
