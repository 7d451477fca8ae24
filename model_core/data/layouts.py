"""How a folder says which caption belongs to which picture. All forms may be mixed in one folder, at any depth.

| form | example |
|---|---|
| a file beside each picture | cat.jpg, cat.txt (or cat.caption; or cat.json with caption or text) |
| Hugging Face image folder | metadata.jsonl or metadata.csv with file_name and caption or text |
| one document | captions.json: {"cat.jpg": "a cat"} or [{"file_name": "cat.jpg", "caption": "a cat"}] |
| parquet | a column image (bytes, or a struct of bytes and path) and one caption or text |
| WebDataset | part-0.tar with cat.jpg, cat.txt |
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model_core.data.skipped import Skipped
from model_core.data.sources import IMAGE_SUFFIXES, SourceFolder
from model_core.documents import UserError

IMAGE_COLUMNS = ("image", "img", "jpg", "png")
CAPTION_COLUMNS = ("caption", "text")
LICENCE_COLUMNS = ("licence", "license")
FILE_COLUMNS = ("file_name", "image", "file")
SIDECAR_SUFFIXES = (".txt", ".caption", ".json")
DOCUMENTS = ("metadata.jsonl", "metadata.csv", "captions.json")
BATCH_ROWS = 64

NO_CAPTION = "no caption"
NO_FILE = "listed, but not there"
NOT_TEXT = "caption file is no UTF-8 text or no JSON"


@dataclass(frozen=True)
class Note:
    """What is said of a picture."""

    caption: str = ""
    licence: str = ""


@dataclass(frozen=True)
class FoundPicture:
    """One captioned picture of a source, as stored."""

    name: str
    data: bytes
    note: Note


def read_folder(folder: SourceFolder, skipped: Skipped, *, scratch: Path) -> Iterator[FoundPicture]:
    """The captioned pictures of a folder, sorted by path; the others are counted in `skipped`."""
    notes = read_documents(folder)
    for path in notes:
        if path not in folder.files:
            skipped.add(NO_FILE, path)
    for path in folder.with_suffix(*IMAGE_SUFFIXES):
        note = _sidecar(folder, path, skipped) or notes.get(path)
        if note is None or not note.caption:
            skipped.add(NO_CAPTION, path)
        else:
            yield FoundPicture(path, folder.read(path), note)
    for path in folder.with_suffix(".parquet"):
        yield from _read_parquet(folder.fetch(path, scratch), path, skipped)
    for path in folder.with_suffix(".tar"):
        yield from _read_tar(folder.fetch(path, scratch), path, skipped)


def has_captions(folder: SourceFolder) -> bool:
    """Whether any loose picture of the folder has a caption; raises UserError for a document that cannot be read."""
    notes = read_documents(folder)
    return any(path in notes or any(beside in folder.files for beside in _beside(path)) for path in folder.with_suffix(*IMAGE_SUFFIXES))


def read_documents(folder: SourceFolder) -> dict[str, Note]:
    """Notes by path from every metadata.jsonl, metadata.csv and captions.json; names in them are relative to where they lie."""
    notes: dict[str, Note] = {}
    for path in folder.files:
        pure = PurePosixPath(path)
        if pure.name not in DOCUMENTS:
            continue
        where = f"data.sources: {folder.uri}/{path}"
        text = _text(folder.read(path))
        if text is None:
            raise UserError(f"{where}: not UTF-8 text")
        for number, entry in _entries(text, pure.name, where):
            name = next((entry[key] for key in FILE_COLUMNS if entry.get(key)), None)
            if not isinstance(name, str):
                raise UserError(f"{where}: entry {number} has the keys {', '.join(entry)}; allowed is one with file_name")
            notes[(pure.parent / name).as_posix()] = _note(entry)
    return notes


def column(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of `wanted` among `names`."""
    return next((name for name in wanted if name in names), None)


def clean(text: str) -> str:
    """The text on one line, without control signs and halves of surrogate pairs, which no caption file can mean."""
    return " ".join("".join(sign if unicodedata.category(sign) not in ("Cc", "Cs") else " " for sign in text).split())


def _entries(text: str, form: str, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, mapping) of each entry of a document."""
    if form == "metadata.csv":
        try:
            yield from enumerate(csv.DictReader(io.StringIO(text), restkey="more"), start=1)
        except csv.Error as error:
            raise UserError(f"{where}: not CSV ({error})") from error
        return
    if form == "metadata.jsonl":
        lines = enumerate(text.split("\n"), start=1)  # splitlines() would also split at signs that JSON text may hold
        entries = [(number, _json(line, f"{where} line {number}")) for number, line in lines if line.strip()]
    else:
        document = _json(text, where)
        if isinstance(document, dict):
            document = [{"file_name": name, **(said if isinstance(said, dict) else {"caption": said})} for name, said in document.items()]
        entries = list(enumerate(document if isinstance(document, list) else [document], start=1))
    for number, entry in entries:
        if not isinstance(entry, dict):
            raise UserError(f"{where}: entry {number} is {json.dumps(entry)[:40]}; allowed is a mapping with file_name and caption")
        yield number, entry


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error


def _note(entry: dict[str, Any]) -> Note:
    def first(wanted: Sequence[str]) -> str:
        value = next((entry[key] for key in wanted if entry.get(key)), "")
        value = value[0] if isinstance(value, list) else value  # several captions: the first
        return clean(value) if isinstance(value, str) else ""

    return Note(first(CAPTION_COLUMNS), first(LICENCE_COLUMNS))


def _beside(path: str) -> list[str]:
    stem = path[: path.rindex(".")]
    return [stem + suffix for suffix in SIDECAR_SUFFIXES if PurePosixPath(stem + suffix).name not in DOCUMENTS]


def _sidecar(folder: SourceFolder, path: str, skipped: Skipped) -> Note | None:
    """The note of the first file beside a picture that has a caption."""
    for beside in _beside(path):
        if beside in folder.files:
            note = _note_in(folder.read(beside), beside)
            if note is None:
                skipped.add(NOT_TEXT, beside)
            elif note.caption:
                return note
    return None


def _note_in(data: bytes, name: str) -> Note | None:
    """What a caption file says; None when it cannot be read."""
    text = _text(data)
    if text is None or not name.endswith(".json"):
        return None if text is None else Note(clean(text))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return _note(value) if isinstance(value, dict) else Note(clean(value)) if isinstance(value, str) else None


def _read_parquet(file: Path, path: str, skipped: Skipped) -> Iterator[FoundPicture]:
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise UserError(f"data.sources: {path}: not a parquet file ({str(error).splitlines()[0]})") from error
    names = parquet.schema_arrow.names
    image, caption, licence = (column(names, wanted) for wanted in (IMAGE_COLUMNS, CAPTION_COLUMNS, LICENCE_COLUMNS))
    if image is None or caption is None:
        raise UserError(f"data.sources: {path}: found columns {', '.join(names)}; allowed are image and caption or text beside others")
    number = 0
    for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=[name for name in (image, caption, licence) if name]):
        for row in pa.Table.from_batches([batch]).to_pylist():
            value = row[image]
            data = value.get("bytes") if isinstance(value, dict) else value
            note, name, number = _note(row), f"{path}#{number}", number + 1
            if not isinstance(data, bytes):
                skipped.add(NO_FILE, name)
            elif not note.caption:
                skipped.add(NO_CAPTION, name)
            else:
                yield FoundPicture(name, data, note)


def _read_tar(file: Path, path: str, skipped: Skipped) -> Iterator[FoundPicture]:
    """Members that share a name up to their suffix are one sample; they lie side by side, as WebDataset writes them."""
    try:
        with tarfile.open(file, "r|*") as archive:
            for key, members in groupby(_tar_members(archive), key=lambda member: member[0]):
                picture, note = None, Note()
                for _, suffix, data in members:
                    if suffix in IMAGE_SUFFIXES:
                        picture = data
                    elif suffix in SIDECAR_SUFFIXES:
                        found = _note_in(data, key + suffix)
                        if found is None:
                            skipped.add(NOT_TEXT, f"{path}#{key}{suffix}")
                        note = note if note.caption else found or note
                if picture is not None and note.caption:
                    yield FoundPicture(f"{path}#{key}", picture, note)
                elif picture is not None:
                    skipped.add(NO_CAPTION, f"{path}#{key}")
    except tarfile.TarError as error:
        raise UserError(f"data.sources: {path}: not a whole tar file ({error})") from error


def _tar_members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """(name without suffix, suffix in lower case, bytes) of each plain file."""
    for member in archive:
        pure = PurePosixPath(member.name)
        if member.isfile() and not pure.name.startswith(".") and (stream := archive.extractfile(member)) is not None:
            yield str(pure.with_suffix("")), pure.suffix.lower(), stream.read()


def _text(data: bytes) -> str | None:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
