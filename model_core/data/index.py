"""The index of a data set version: where each row group lies, what it holds and its digest, with the shards' footers.

With it a row group costs one ranged GET, and the order of a whole epoch is known without listing or opening a shard. A
version is the file `index-00000.parquet`, written once; `index.json` names the newest. A later version lists all that the one
before lists, and more.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model_core.data.folders import Folder
from model_core.documents import UserError
from model_core.storage import ConflictError, Storage

FORMAT = "darkroom-index-1"
POINTER = "index.json"
ID_BYTES = 16

SCHEMA = pa.schema(
    [
        ("path", pa.dictionary(pa.int32(), pa.string())),
        ("row_group", pa.int32()),
        ("bucket", pa.dictionary(pa.int32(), pa.string())),
        ("rows", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("sha256", pa.binary(32)),
        ("id_sum", pa.binary(ID_BYTES)),
        ("footer", pa.large_binary()),
    ],
    metadata={"format": FORMAT},
)


@dataclass(frozen=True)
class RowGroup:
    """One row group: bytes [offset, offset + length) of the shard `path`, their sha256, and what they hold.

    `bucket` names what its rows have in common; `id_sum` is the sum of their ids mod 2^128; `footer` is the shard's, in the
    entry of its first row group only.
    """

    path: str
    row_group: int
    bucket: str
    rows: int
    offset: int
    length: int
    sha256: bytes
    id_sum: int
    footer: bytes | None = None

    def __str__(self) -> str:
        return f"{self.path} row group {self.row_group}"


class Index:
    """The row groups of one version, in order. `digest` is the sha256 (hex) of the index's own bytes."""

    def __init__(self, table: pa.Table, *, version: int, digest: str) -> None:
        self.version, self.digest = version, digest
        self._table = table.combine_chunks()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @cached_property
    def rows(self) -> np.ndarray:
        """Rows of each row group: (len,) int32."""
        return self._table["rows"].to_numpy()

    @property
    def num_rows(self) -> int:
        """Rows of the whole version."""
        return int(self.rows.sum(dtype=np.int64))

    @cached_property
    def buckets(self) -> list[str]:
        """Names of the buckets."""
        return sorted(pc.unique(self._table["bucket"]).to_pylist())

    @cached_property
    def paths(self) -> list[str]:
        """The shards, in order."""
        return list(dict.fromkeys(pc.unique(self._table["path"]).to_pylist()))

    def in_buckets(self, buckets: Sequence[str]) -> np.ndarray:
        """Numbers of the row groups in any of `buckets`, rising: (G,) int64."""
        return np.flatnonzero(pc.is_in(self._table["bucket"], pa.array(list(buckets), pa.string())).to_numpy())

    def __getitem__(self, number: int) -> RowGroup:
        entry = {name: self._table[name][number].as_py() for name in SCHEMA.names}
        return RowGroup(**{**entry, "id_sum": int.from_bytes(entry["id_sum"], "big")})

    def id_sum(self, groups: np.ndarray) -> int:
        """Sum of all ids in these row groups, mod 2^128: what a ledger must reach in an epoch."""
        sums = self._table["id_sum"].take(pa.array(groups))
        return sum_ids(value.as_py() for value in sums)

    def footer(self, path: str) -> bytes:
        """The footer of a shard."""
        return self._footers[path]

    @cached_property
    def _footers(self) -> dict[str, bytes]:
        first = self._table.filter(pc.is_valid(self._table["footer"]))
        return dict(zip(first["path"].to_pylist(), first["footer"].to_pylist(), strict=True))


def sum_ids(ids: Iterable[bytes]) -> int:
    """Sum of 16-byte ids, read as big-endian numbers, mod 2^128: a digest of the multiset, whatever its order.

    Ids are content hashes, so equal sums of different multisets would be a collision of a 128-bit hash.
    """
    return sum(int.from_bytes(value, "big") for value in ids) % (1 << 8 * ID_BYTES)


def write_index(folder: Path, groups: Sequence[RowGroup]) -> Index:
    """Writes the first version of a data set's index below `folder`, and the pointer to it."""
    data = _encode(groups)
    index = _decode(data, version=0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _name(0)).write_bytes(data)
    (folder / POINTER).write_bytes(_pointer(index))
    return index


def append_version(storage: Storage, groups: Sequence[RowGroup]) -> Index:
    """Adds row groups, whose shards are stored already, as a new version of the data set at `storage`.

    Several writers may append at once: each version is created once and the pointer moves by compare-and-swap, so none loses
    what another has added.
    """
    while True:
        pointer = json.loads(storage.get(POINTER))
        old = _decode(storage.get(pointer["path"]), version=pointer["version"])
        data = _encode([*(old[number] for number in range(len(old))), *groups])
        index = _decode(data, version=old.version + 1)
        try:
            storage.put(_name(index.version), data, create_only=True)
        except ConflictError:  # another writer's; it may have died before it moved the pointer
            _advance(storage, _decode(storage.get(_name(index.version)), version=index.version))
            continue
        _advance(storage, index)
        return index


def read_index(folder: Folder, version: int | None = None) -> Index:
    """The newest version's index, or that of `version`; raises UserError for another format or a pointer that does not fit."""
    pointer = folder.read_json(POINTER)
    where = folder.path(POINTER)
    if pointer.get("format") != FORMAT:
        raise UserError(f"{where}: found index format {pointer.get('format')!r}; allowed is {FORMAT!r}")
    if version is not None and not 0 <= version <= pointer["version"]:
        raise UserError(f"{where}: found no version {version}; allowed are 0 to {pointer['version']}")
    wanted = pointer["version"] if version is None else version
    index = _decode(folder.path(_name(wanted)).read_bytes(), version=wanted)
    if wanted == pointer["version"] and index.digest != pointer["sha256"]:
        raise UserError(f"{folder.path(_name(wanted))}: changed since it was written; {POINTER} promises other content")
    return index


def describe_shard(data: bytes | memoryview, *, path: str, bucket: str, id_sums: Sequence[int]) -> list[RowGroup]:
    """The entries of a shard's row groups, from its bytes and the sums of the ids in each."""
    view = memoryview(data)
    metadata = pq.read_metadata(pa.BufferReader(pa.py_buffer(data)))
    footer = bytes(view[len(view) - 8 - int.from_bytes(view[-8:-4], "little") :])
    groups = []
    for number, id_sum in enumerate(id_sums):
        columns = [metadata.row_group(number).column(index) for index in range(metadata.num_columns)]
        # Dictionary pages are switched off, so a chunk begins with its first data page.
        start = min(column.data_page_offset for column in columns)
        end = max(column.data_page_offset + column.total_compressed_size for column in columns)
        groups.append(
            RowGroup(
                path=path,
                row_group=number,
                bucket=bucket,
                rows=metadata.row_group(number).num_rows,
                offset=start,
                length=end - start,
                sha256=hashlib.sha256(view[start:end]).digest(),
                id_sum=id_sum,
                footer=footer if number == 0 else None,
            )
        )
    return groups


def _advance(storage: Storage, index: Index) -> None:
    """Moves the pointer to `index`, unless it is there or further already."""
    while True:
        etag, pointer = storage.stat(POINTER).etag, json.loads(storage.get(POINTER))
        if pointer["version"] >= index.version:
            return
        try:
            storage.put(POINTER, _pointer(index), if_match=etag)
        except ConflictError:
            continue
        return


def _encode(groups: Sequence[RowGroup]) -> bytes:
    columns = {name: [getattr(group, name) for group in groups] for name in SCHEMA.names if name != "id_sum"}
    columns["id_sum"] = [group.id_sum.to_bytes(ID_BYTES, "big") for group in groups]
    table = pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, schema=SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_statistics=False)
    return buffer.getvalue()


def _decode(data: bytes, *, version: int) -> Index:
    table = pq.read_table(pa.BufferReader(data)).cast(SCHEMA)
    return Index(table, version=version, digest=hashlib.sha256(data).hexdigest())


def _pointer(index: Index) -> bytes:
    document = {
        "format": FORMAT,
        "version": index.version,
        "path": _name(index.version),
        "sha256": index.digest,
        "rows": index.num_rows,
    }
    return (json.dumps(document, indent=1) + "\n").encode()


def _name(version: int) -> str:
    return f"index-{version:05d}.parquet"
