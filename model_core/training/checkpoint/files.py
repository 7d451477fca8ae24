"""State as files of torch.distributed.checkpoint in a local folder, written by all ranks and read at any world size."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from model_core.storage import StorageError
from model_core.training.checkpoint.commit import SavedFile
from model_core.training.checkpoint.hashing import HashingFileSystem
from model_core.training.distributed import Ranks

VALUES = "values.json"


class _Writer(FileSystemWriter):
    def __init__(self, folder: Path) -> None:
        # One thread: an error in any other of DCP's would be printed and forgotten, and the files would be incomplete.
        super().__init__(folder, thread_count=1, sync_files=True, overwrite=False)
        self.fs: HashingFileSystem = HashingFileSystem()

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # A full disk, for one: torch's zip writer hides the file system's error behind a position in its own file.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def write_files(folder: Path, document: Any, tensors: Mapping[str, Tensor], *, ranks: Ranks) -> list[SavedFile]:
    """Writes the state into the new `folder`, synced; returns this rank's files. Collective.

    Tensors that all ranks hold alike are shared out among them. Raises StorageError on all ranks when one cannot write.
    """
    _quiet()
    writer = _Writer(folder)
    try:
        save(dict(tensors), storage_writer=writer, process_group=ranks.group, no_dist=ranks.size == 1)
    except CheckpointException as error:
        raise StorageError(_reason(error, folder)) from error
    if ranks.is_first:
        with writer.fs.create_stream(folder / VALUES, "wb") as file:
            file.write(json.dumps(document).encode())
            file.flush()
            os.fsync(file.fileno())
    return [SavedFile(path=name, bytes=size, sha256=sha256) for name, (size, sha256) in sorted(writer.fs.written.items())]


def read_document(folder: Path) -> Any:
    """What `write_files` took as `document`."""
    return json.loads((folder / VALUES).read_bytes())


def read_tensors(folder: Path, templates: Mapping[str, Tensor], *, ranks: Ranks) -> dict[str, Tensor]:
    """The tensors in `folder`, by name. Collective.

    One that has a template of its size and type is read into the template, wherever and however sharded that lies; the
    others become tensors on the CPU. Only for files that are known to be our own: this unpickles.
    """
    _quiet()
    reader = FileSystemReader(folder)
    tensors: dict[str, Tensor] = {}
    for name, saved in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(saved, TensorStorageMetadata), "values that are no tensors are in values.json"
        size, dtype = saved.size, saved.properties.dtype
        template = templates.get(name)
        if template is None or (template.shape, template.dtype) != (size, dtype):
            template = torch.empty(size, dtype=dtype)
        tensors[name] = template
    try:
        load(tensors, storage_reader=reader, process_group=ranks.group, no_dist=ranks.size == 1)
    except CheckpointException as error:
        raise StorageError(_reason(error, folder)) from error
    return tensors


def _reason(error: Any, folder: Path) -> str:
    """What the first rank that failed met, in one line; the traceback is in the exception's cause."""
    rank, (cause, _) = min(error.failures.items())
    return f"{folder}: rank {rank} met {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}"


def _quiet() -> None:
    """One process without a process group is what a laptop has, and no reason to warn at each save."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
