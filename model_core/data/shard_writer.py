"""Writes tables of one bucket to parquet shards whose names are their content."""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from model_core.data.index import RowGroup, describe_shard, sum_ids

ROW_GROUP_BYTES = 16 * 2**20
SHARD_BYTES = 256 * 2**20


class ShardWriter:
    """Shards below `root/folder`, each `part-<first 16 hex of its sha256>.parquet`; `close` tells where the rows went."""

    def __init__(self, root: Path, folder: str, schema: pa.Schema, *, bucket: str) -> None:
        self._root, self._folder, self._schema, self._bucket = root, folder, schema, bucket
        self._writer: pq.ParquetWriter | None = None
        self._bytes = 0
        self._id_sums: list[int] = []
        self._groups: list[RowGroup] = []

    def write(self, table: pa.Table, num_bytes: int) -> None:
        """Adds `table`, which holds about `num_bytes`, as one row group."""
        if self._writer is None:
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            # Compressed pictures and latents gain nothing from compression, dictionaries or statistics.
            self._writer = pq.ParquetWriter(
                self._partial, self._schema, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
            )
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._id_sums.append(sum_ids(table["sample_id"].to_pylist()))
        self._bytes += num_bytes
        if self._bytes >= SHARD_BYTES:
            self._finish_shard()

    def close(self) -> list[RowGroup]:
        """Finishes the last shard; returns the row groups of all, in the order they were written."""
        if self._writer is not None:
            self._finish_shard()
        return self._groups

    @property
    def _partial(self) -> Path:
        return self._root / self._folder / ".part"

    def _finish_shard(self) -> None:
        assert self._writer is not None
        self._writer.close()
        with self._partial.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            path = f"{self._folder}/part-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
            view = memoryview(data)
            try:
                self._groups += describe_shard(view, path=path, bucket=self._bucket, id_sums=self._id_sums)
            finally:
                view.release()
        self._partial.replace(self._root / path)
        self._writer, self._bytes, self._id_sums = None, 0, []
