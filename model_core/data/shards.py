"""Raw shards: pictures as they came, with what is known of them, in parquet (docs: training-core, shard format).

`shards/part-HASH.parquet` hold the rows, `index.json` and what it names list them (model_core/data/index.py). Equal rows give
equal bytes.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from model_core.data.folders import Folder
from model_core.data.index import read_index, write_index
from model_core.data.keys import key_bytes, keyed_uniform
from model_core.data.phash import perceptual_hash
from model_core.data.shard_writer import ROW_GROUP_BYTES, ShardWriter
from model_core.data.skipped import Skipped
from model_core.documents import UserError

BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)  # what Pillow raises

FORMAT = b"darkroom-raw-1"
BUCKET = "raw"  # pictures of all sizes lie together
HELD_OUT_SHARE = 1 / 20

SCHEMA = pa.schema(
    [
        ("sample_id", pa.binary(16)),
        ("kind", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image", pa.large_binary()),
        ("references", pa.list_(pa.large_binary())),
        ("instruction", pa.string()),
        ("operation", pa.string()),
        ("caption", pa.string()),
        ("annotation", pa.string()),
        ("phash", pa.uint64()),
        ("provenance", pa.string()),
        ("licence", pa.string()),
        ("held_out", pa.bool_()),
    ],
    metadata={"format": FORMAT},
)


@dataclass(frozen=True, kw_only=True)
class RawRow:
    """One picture. For an edit, `image` is the target and `references` are the sources; else there are none."""

    sample_id: bytes = b""
    kind: str = "image"
    width: int = 0
    height: int = 0
    image: bytes = b""
    references: Sequence[bytes] = ()
    instruction: str = ""
    operation: str = ""
    caption: str = ""
    annotation: str = "{}"
    phash: int = 0
    provenance: str = ""
    licence: str = ""
    held_out: bool = False

    def notes(self) -> dict[str, Any]:
        """The annotation as a mapping."""
        document: dict[str, Any] = json.loads(self.annotation)
        return document


def make_row(
    image: Image.Image, *, kind: str, references: Sequence[Image.Image] = (), encoded: bytes | None = None, **known: Any
) -> RawRow:
    """A row with its id (content hash), size, perceptual hash and held-out mark filled in.

    `encoded` are the bytes that `image` was decoded from; without them it is stored as PNG.
    """
    data, sources = encoded or encode_image(image), [encode_image(reference) for reference in references]
    digest = hashlib.sha256(data)
    for part in (known.get("caption", ""), known.get("instruction", ""), *sources):
        digest.update(hashlib.sha256(part if isinstance(part, bytes) else part.encode()).digest())
    sample_id = digest.digest()[:16]
    return RawRow(
        sample_id=sample_id,
        kind=kind,
        width=image.width,
        height=image.height,
        image=data,
        references=sources,
        phash=perceptual_hash(image),
        held_out=keyed_uniform("held out row", sample_id) < HELD_OUT_SHARE,
        **known,
    )


def encode_image(image: Image.Image) -> bytes:
    """Lossless PNG bytes; equal pictures give equal bytes."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode_image(data: bytes) -> Image.Image:
    """The RGB picture in `data`; raises one of BROKEN."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def write_rows(folder: Path, rows: Iterable[RawRow]) -> int:
    """Writes shards and their index below `folder`; returns the number of rows."""
    writer = ShardWriter(folder, "shards", SCHEMA, bucket=BUCKET)
    group: list[RawRow] = []
    group_bytes = 0

    def flush() -> None:
        nonlocal group, group_bytes
        writer.write(pa.Table.from_pylist([_as_dict(row) for row in group], schema=SCHEMA), group_bytes)
        group, group_bytes = [], 0

    for row in rows:
        group.append(row)
        group_bytes += _bytes(row)
        if group_bytes >= ROW_GROUP_BYTES:
            flush()
    if group:
        flush()
    return write_index(folder, writer.close()).num_rows


def unique_rows(rows: Iterable[RawRow], repeated: Skipped) -> Iterator[RawRow]:
    """The rows without those whose id came before: the same picture with the same words is one row."""
    seen: set[bytes] = set()
    for row in rows:
        if row.sample_id in seen:
            repeated.add("same picture and words as an earlier one", row.provenance)
        else:
            seen.add(row.sample_id)
            yield row


def read_rows(folder: Folder, columns: Sequence[str] | None = None) -> Iterator[RawRow]:
    """Rows in order, one row group in memory at a time; with `columns`, the other fields keep their defaults."""
    for name in read_index(folder).paths:
        path = folder.path(name)
        file = pq.ParquetFile(path, page_checksum_verification=True)
        if (file.schema_arrow.metadata or {}).get(b"format") != FORMAT:
            raise UserError(f"{path}: found shard format {(file.schema_arrow.metadata or {}).get(b'format')!r}; allowed is {FORMAT!r}")
        for group in range(file.num_row_groups):
            for row in file.read_row_group(group, columns=None if columns is None else list(columns)).to_pylist():
                yield RawRow(**row)


def spread_rows(folder: Folder, num: int) -> list[RawRow]:
    """At most `num` rows, evenly spread over the whole folder."""
    total = int(folder.read_json("index.json")["rows"])
    wanted = {index * total // num for index in range(num)} if total > num else set(range(total))
    return [row for index, row in enumerate(read_rows(folder)) if index in wanted]


def draw_rows(rows: Iterable[RawRow], num: int, *key: object) -> list[RawRow]:
    """At most `num` of the rows, drawn by `key`; no more than those are held in memory."""
    return heapq.nsmallest(num, rows, key=lambda row: key_bytes(*key, row.sample_id))


def read_kept_rows(
    kept: Folder, inputs: Mapping[str, Folder], *, kinds: Sequence[str] | None = None, columns: Sequence[str] | None = None
) -> Iterator[RawRow]:
    """The rows that `kept.parquet` lists of these inputs, of the given kinds (None: all), input by input in their stored order.

    With `columns`, which must name sample_id, the other fields keep their defaults.
    """
    wanted: dict[str, set[bytes]] = {}
    for entry in pq.read_table(kept.path("kept.parquet"), columns=["sample_id", "kind", "input"]).to_pylist():
        if entry["input"] in inputs and (kinds is None or entry["kind"] in kinds):
            wanted.setdefault(entry["input"], set()).add(entry["sample_id"])
    for source in sorted(wanted):
        for row in read_rows(inputs[source], columns=columns):
            if row.sample_id in wanted[source]:
                yield row


def _as_dict(row: RawRow) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(row)}


def _bytes(row: RawRow) -> int:
    return len(row.image) + sum(len(reference) for reference in row.references)
