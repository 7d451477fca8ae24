"""Row groups of a data set, each fetched by one ranged read, checked against its sha256 and kept while it is in use."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from model_core.data.folders import Shards
from model_core.data.index import Index, RowGroup
from model_core.storage import CorruptError, NotFoundError, StorageError

ATTEMPTS = 3
OUTAGE_SECONDS = 300.0  # how long a store may be away, beyond what its own client waits for
PAUSE_SECONDS = 1.0
MAX_QUARANTINED_SHARE = 0.01

Group = TypeVar("Group")


class RowGroups(Generic[Group]):
    """Row groups by their number in the index, made by `make` of a table; the `capacity` last used stay in memory.

    Safe for threads: one that asks for what another is fetching waits for it. A group whose bytes are missing or are not what
    the index promises is read `ATTEMPTS` times and then quarantined: it is reported, counted, and `get` gives None for it. A
    store that is away is waited for. Raises StorageError when the store stays away, or when more than one group in a hundred
    (and more than one) is in quarantine.
    """

    def __init__(self, shards: Shards, index: Index, make: Callable[[pa.Table, str], Group], *, capacity: int, say: Callable[[str], None]):
        self.index, self.capacity = index, capacity
        self.quarantined: dict[int, str] = {}
        self.num_reads = 0
        self._shards, self._make, self._say = shards, make, say
        self._lock = threading.Lock()
        self._groups: OrderedDict[int, Future[Group | None]] = OrderedDict()
        self._checked: set[int] = set()
        self._metadata: dict[str, pq.FileMetaData] = {}

    def get(self, number: int) -> Group | None:
        """A row group, or None when it is in quarantine."""
        with self._lock:
            future = self._groups.get(number)
            if mine := future is None:
                future = self._groups[number] = Future()
                while len(self._groups) > self.capacity:
                    self._groups.popitem(last=False)
            else:
                self._groups.move_to_end(number)
        assert future is not None
        if mine:
            try:
                future.set_result(self._fetch(number))
            except BaseException as error:  # noqa: BLE001 - raised again by future.result() below
                with self._lock:
                    self._groups.pop(number, None)
                future.set_exception(error)
        return future.result()

    def has(self, number: int) -> bool:
        """Whether a row group is in memory, or on its way."""
        with self._lock:
            return number in self._groups

    def _fetch(self, number: int) -> Group | None:
        entry, damage = self.index[number], 0
        deadline = time.monotonic() + OUTAGE_SECONDS
        while True:
            try:
                return self._make(self._read(number, entry), entry.path)
            except (CorruptError, NotFoundError) as error:
                damage += 1
                if damage == ATTEMPTS:
                    self._quarantine(number, entry, str(error))
                    return None
            except StorageError as error:
                if time.monotonic() > deadline:
                    raise
                self._say(f"{entry}: {error}; trying again")
                time.sleep(PAUSE_SECONDS)

    def _read(self, number: int, entry: RowGroup) -> pa.Table:
        """The table of a row group. A local one is mapped, and hashed the first time only."""
        local = self._shards.local(entry.path)
        source: pa.NativeFile
        if local is not None:
            try:
                source = pa.memory_map(str(local))
            except FileNotFoundError as error:
                raise NotFoundError(f"{local}: not found") from error
            if number not in self._checked:
                _check(memoryview(source.read_at(entry.length, entry.offset)), entry, str(local))
                self._checked.add(number)
        else:
            data = self._shards.read(entry.path, start=entry.offset, length=entry.length)
            _check(data, entry, entry.path)
            source = pa.PythonFile(_Span(data, entry.offset), mode="r")
        with self._lock:
            self.num_reads += 1
            if entry.path not in self._metadata:
                self._metadata[entry.path] = pq.read_metadata(pa.BufferReader(self.index.footer(entry.path)))
        return pq.ParquetFile(source, metadata=self._metadata[entry.path]).read_row_group(entry.row_group, use_threads=False)

    def _quarantine(self, number: int, entry: RowGroup, reason: str) -> None:
        with self._lock:
            self.quarantined[number] = reason
            num = len(self.quarantined)
        self._say(f"quarantined {entry} with {entry.rows} rows after {ATTEMPTS} reads: {reason}")
        if num > max(1, MAX_QUARANTINED_SHARE * len(self.index)):
            raise StorageError(f"{num} of {len(self.index)} row groups are damaged, the last one {entry}: {reason}")


class _Span(io.RawIOBase):
    """A file of which only the bytes from `start` on are here: those of one row group."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data, self._start, self._place = memoryview(data), start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._start + len(self._data))[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> memoryview:  # pyarrow takes any buffer, without a copy
        begin = self._place - self._start
        assert begin >= 0, "a reader with the footer at hand reads nothing before the row group"
        piece = self._data[begin:] if size < 0 else self._data[begin : begin + size]
        self._place += len(piece)
        return piece


def _check(data: bytes | memoryview, entry: RowGroup, where: str) -> None:
    if len(data) != entry.length:
        raise CorruptError(f"{where}: row group {entry.row_group} is cut off: found {len(data)} bytes of {entry.length}")
    if hashlib.sha256(data).digest() != entry.sha256:
        raise CorruptError(f"{where}: row group {entry.row_group} changed since it was written; its index promises other content")
