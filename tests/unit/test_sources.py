"""Sources: every accepted layout gives the same pictures and captions; what is wrong is said in one sentence or counted."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from model_core.data.layouts import read_folder
from model_core.data.skipped import Skipped
from model_core.data.sources import check_sources, decode_picture, open_source, source_fingerprint
from model_core.documents import UserError
from model_core.recipe import Recipe
from model_core.site import Site

SITE = Site()
CAPTIONS = {"a.png": "a red square", "b.jpg": "a green square", "deep/c.png": "a blue square"}
COLORS = {"a.png": (200, 0, 0), "b.jpg": (0, 200, 0), "deep/c.png": (0, 0, 200)}


def recipe(*sources: str, **data: object) -> Recipe:
    stages = {"stages": {"S1": {"resolution_px": 64}}}
    return Recipe.model_validate({"name": "test", "data": {"sources": list(sources), **data}, "mmdit": stages})


def encoded(name: str, size: tuple[int, int] = (24, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, COLORS.get(name, (9, 9, 9))).save(buffer, "JPEG" if name.endswith("jpg") else "PNG")
    return buffer.getvalue()


def put(folder: Path, name: str, data: bytes | str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def pictures(folder: Path) -> None:
    for name in CAPTIONS:
        put(folder, name, encoded(name))


def sidecars(folder: Path) -> None:
    pictures(folder)
    put(folder, "a.txt", "a red square\n")
    put(folder, "b.caption", "a green  square")
    put(folder, "deep/c.json", json.dumps({"text": "a blue square", "width": 3}))


def metadata_jsonl(folder: Path) -> None:
    pictures(folder)
    put(folder, "metadata.jsonl", "".join(json.dumps({"file_name": name, "text": said}) + "\n" for name, said in CAPTIONS.items()))


def metadata_csv(folder: Path) -> None:
    pictures(folder)
    put(folder, "metadata.csv", "file_name,caption\na.png,a red square\nb.jpg,a green square\n")
    put(folder, "deep/metadata.csv", "file_name,caption\nc.png,a blue square\n")


def captions_json(folder: Path) -> None:
    pictures(folder)
    put(folder, "captions.json", json.dumps(CAPTIONS))


def captions_json_list(folder: Path) -> None:
    pictures(folder)
    put(folder, "captions.json", json.dumps([{"image": name, "caption": [said, "another"]} for name, said in CAPTIONS.items()]))


def parquet_of_structs(folder: Path) -> None:
    rows = [{"image": {"bytes": encoded(name), "path": name}, "text": said} for name, said in CAPTIONS.items()]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000.parquet")


def parquet_of_bytes(folder: Path) -> None:
    pq.write_table(
        pa.Table.from_pylist([{"image": encoded(name), "caption": said} for name, said in CAPTIONS.items()]), folder / "x.parquet"
    )


def webdataset(folder: Path) -> None:
    with tarfile.open(folder / "part-0.tar", "w") as archive:
        for name, said in CAPTIONS.items():
            stem = name.rpartition(".")[0]
            for member, data in ((name, encoded(name)), (f"{stem}.txt", said.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


LAYOUTS = [sidecars, metadata_jsonl, metadata_csv, captions_json, captions_json_list, parquet_of_structs, parquet_of_bytes, webdataset]


def found(folder: Path, tmp_path: Path) -> tuple[dict[str, tuple[int, ...]], Skipped]:
    skipped = Skipped()
    rows = read_folder(open_source(folder.as_uri(), SITE), skipped, scratch=tmp_path / "scratch")
    return {row.note.caption: decode_picture(row.data, 512)[0].getpixel((3, 3)) for row in rows}, skipped


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_gives_the_same_pictures_and_captions(layout, tmp_path):
    folder = tmp_path / "my photos"
    folder.mkdir()
    layout(folder)
    check_sources(recipe(folder.as_uri()), SITE)
    by_caption, skipped = found(folder, tmp_path)
    assert list(by_caption) == list(CAPTIONS.values())
    for name, said in CAPTIONS.items():
        assert np.abs(np.subtract(by_caption[said], COLORS[name])).max() <= 3
    assert not skipped.counts


def test_layouts_may_be_mixed_in_one_folder(tmp_path):
    for layout in (sidecars, webdataset, parquet_of_bytes):
        layout(tmp_path)
    assert sum(1 for _ in read_folder(open_source(tmp_path.as_uri(), SITE), Skipped(), scratch=tmp_path)) == 9


def test_what_cannot_be_taken_is_counted_and_named(tmp_path):
    sidecars(tmp_path)
    put(tmp_path, "alone.png", encoded("alone.png"))
    put(tmp_path, "empty.png", encoded("empty.png"))
    put(tmp_path, "empty.txt", "  \n")
    put(tmp_path, "latin.png", encoded("latin.png"))
    put(tmp_path, "latin.txt", b"caf\xe9")
    put(tmp_path, "metadata.jsonl", '{"file_name": "gone.png", "text": "gone"}\n')
    put(tmp_path, "._a.png", b"what a Mac leaves behind")
    by_caption, skipped = found(tmp_path, tmp_path)
    assert len(by_caption) == 3
    assert skipped.examples["no caption"] == ["alone.png", "empty.png", "latin.png"]
    assert skipped.examples["listed, but not there"] == ["gone.png"]
    assert skipped.examples["caption file is no UTF-8 text or no JSON"] == ["latin.txt"]


def test_captions_lose_control_signs_and_lone_surrogates(tmp_path):
    put(tmp_path, "a.png", encoded("a.png"))
    put(tmp_path, "captions.json", '{"a.png": "a\\u0007 red\\ud800\\nsquare \\u4f60\\u597d"}')
    assert list(found(tmp_path, tmp_path)[0]) == ["a red square 你好"]


def test_lines_of_jsonl_end_at_line_feeds_alone(tmp_path):
    put(tmp_path, "a.png", encoded("a.png"))
    put(tmp_path, "metadata.jsonl", '{"file_name": "a.png", "text": "a red\u2028square"}\r\n')
    assert [caption.split() for caption in found(tmp_path, tmp_path)[0]] == [["a", "red", "square"]]


def test_a_file_beside_a_picture_that_says_no_caption_leaves_it_to_the_next(tmp_path):
    put(tmp_path, "a.png", encoded("a.png"))
    put(tmp_path, "a.txt", "")
    put(tmp_path, "a.json", json.dumps({"width": 24}))
    put(tmp_path, "metadata.jsonl", json.dumps({"file_name": "a.png", "text": "a red square"}))
    assert list(found(tmp_path, tmp_path)[0]) == ["a red square"]


MISTAKES = {
    "missing": (lambda folder: None, "no such folder"),
    "a file": (lambda folder: put(folder.parent, folder.name, "x"), "found a file; allowed is the folder"),
    "empty": (lambda folder: folder.mkdir(), "holds nothing; allowed are .bmp"),
    "no picture": (lambda folder: put(folder, "notes.txt", "x"), "holds 1 files, none of them a picture"),
    "no caption": (lambda folder: put(folder, "a.png", encoded("a.png")), "holds 1 pictures without a caption; allowed are a .txt"),
    "broken jsonl": (
        lambda folder: (pictures(folder), put(folder, "metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{oops\n')),
        "metadata.jsonl line 2: not JSON",
    ),
    "no file name": (lambda folder: (pictures(folder), put(folder, "metadata.csv", "name,text\na,x\n")), "entry 1 has the keys name, text"),
    "list of strings": (lambda folder: (pictures(folder), put(folder, "captions.json", '["x"]')), "entry 1 is \"x\"; allowed is a mapping"),
    "cells without a column": (
        lambda folder: (pictures(folder), put(folder, "metadata.csv", "name,text\na,x,y,z\n")),
        "entry 1 has the keys name, text, more",
    ),
    "a cell beyond CSV": (
        lambda folder: (pictures(folder), put(folder, "metadata.csv", "file_name,text\na.png," + "x" * 200_000 + "\n")),
        "metadata.csv: not CSV",
    ),
    "endless JSON": (lambda folder: (pictures(folder), put(folder, "captions.json", "[" * 100_000)), "captions.json: not JSON"),
    "not UTF-8": (lambda folder: (pictures(folder), put(folder, "metadata.csv", b"file_name,text\na.png,\xff\n")), "not UTF-8 text"),
    "no parquet": (lambda folder: put(folder, "x.parquet", "not parquet"), "x.parquet: not a parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_folder_is_refused_in_one_sentence_before_work(mistake, tmp_path):
    make, sentence = MISTAKES[mistake]
    make(tmp_path / "photos")
    with pytest.raises(UserError, match=sentence) as caught:
        check_sources(recipe((tmp_path / "photos").as_uri()), SITE)
    assert "\n" not in str(caught.value)
    assert "photos" in str(caught.value)


def test_a_parquet_without_captions_is_refused(tmp_path):
    pq.write_table(pa.table({"image": [b"x"], "label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="found columns image, label; allowed is one named caption or text"):
        check_sources(recipe(tmp_path.as_uri()), SITE)


def test_a_relative_folder_is_refused():
    with pytest.raises(UserError, match="allowed is an absolute folder"):
        check_sources(recipe("file://photos"), SITE)


def test_scenes_over_photographs_need_photographs():
    with pytest.raises(UserError, match="photo_background_share: found 0.5 with no photographs"):
        check_sources(recipe("synthetic://scenes", scenes={"photo_background_share": 0.5}), SITE)


def test_the_fingerprint_changes_with_what_a_folder_holds_and_scenes_have_none(tmp_path):
    sidecars(tmp_path)
    mixed = recipe("synthetic://scenes", tmp_path.as_uri())
    before = source_fingerprint(mixed, SITE)
    assert before == source_fingerprint(mixed, SITE)
    assert len(before) == 1
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    touched = source_fingerprint(mixed, SITE)
    put(tmp_path, "d.png", encoded("d.png"))
    assert len({json.dumps(each) for each in (before, touched, source_fingerprint(mixed, SITE))}) == 3


def test_a_bucket_is_read_like_a_folder(tmp_path, monkeypatch):
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    sidecars(tmp_path)
    parquet_of_bytes(tmp_path)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        client.create_bucket(Bucket="photos")
        for path in tmp_path.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "photos", f"mine/{path.relative_to(tmp_path).as_posix()}")
        site = Site.model_validate({"s3": {"endpoint_url": endpoint, "retry_seconds": 0}})
        check_sources(recipe("s3://photos/mine"), site)
        folder = open_source("s3://photos/mine", site)
        rows = list(read_folder(folder, Skipped(), scratch=tmp_path / "scratch"))
        assert [row.note.caption for row in rows] == 2 * list(CAPTIONS.values())
        assert source_fingerprint(recipe("s3://photos/mine"), site)[0][0][0] == "a.png"
        with pytest.raises(UserError, match="data.sources: s3://nowhere/x: cannot be read"):
            check_sources(recipe("s3://nowhere/x"), site)
    finally:
        server.stop()


def test_pictures_come_upright_in_rgb_on_white_and_no_longer_than_the_limit():
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the picture is to be shown turned by 90 degrees to the right
    wide = Image.new("RGB", (40, 20), (0, 0, 0))
    wide.paste((255, 0, 0), (0, 0, 20, 20))
    wide.save(buffer, "PNG", exif=exif)
    upright, stored = decode_picture(buffer.getvalue(), 512)
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (255, 0, 0)
    assert stored is None

    buffer = io.BytesIO()
    Image.new("RGBA", (900, 300), (0, 0, 0, 0)).save(buffer, "PNG")
    clear, _ = decode_picture(buffer.getvalue(), 512)
    assert (clear.size, clear.mode, clear.getpixel((5, 5))) == ((512, 171), "RGB", (255, 255, 255))


def test_a_plain_jpeg_is_stored_as_it_came_and_one_with_a_place_in_it_is_not():
    plain = encoded("b.jpg")
    assert decode_picture(plain, 512)[1] == plain
    exif = Image.Exif()
    exif[0x010E] = "my house"
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20)).save(buffer, "JPEG", exif=exif)
    assert decode_picture(buffer.getvalue(), 512)[1] is None


@pytest.mark.parametrize("mode", ["L", "P", "LA", "CMYK", "1", "I;16", "F"])
def test_every_mode_of_picture_becomes_rgb(mode):
    buffer = io.BytesIO()
    image = Image.new("L", (8, 8), 128)
    image = image.convert("RGB").convert(mode) if mode not in ("I;16", "F") else Image.fromarray(np.full((8, 8), 128, np.uint16))
    image.convert("F" if mode == "F" else image.mode).save(buffer, "TIFF")
    assert decode_picture(buffer.getvalue(), 512)[0].mode == "RGB"
