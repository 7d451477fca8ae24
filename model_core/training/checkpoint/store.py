"""The checkpoints of one step's key: saved in the background, committed last, restored from the newest sound one."""

from __future__ import annotations

import dataclasses
import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from model_core.storage import ConflictError, Storage, StorageError
from model_core.storage.file import sync
from model_core.training.checkpoint.agreement import together
from model_core.training.checkpoint.commit import COMMIT, Commit, SavedFile, committed_steps, step_folder
from model_core.training.checkpoint.retention import remove_below, remove_outdated
from model_core.training.checkpoint.values import put_together, take_apart
from model_core.training.checkpoint.verification import examine, place_of
from model_core.training.distributed import Ranks

# How long one rank waits for the others' uploads before it takes them for dead.
PATIENCE = timedelta(hours=2)
FAILURES_IN_A_ROW = 2


class Stateful(Protocol):
    """What a checkpoint holds by name: a model, an optimizer, curves."""

    def state_dict(self) -> dict[str, Any]:
        """All that must be known to go on: nested dicts and lists of tensors, numbers, strings, booleans and None."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Takes up what `state_dict` gave."""


@dataclass(frozen=True)
class Restored:
    """The checkpoint that a training goes on from: the optimizer step it was saved after, and the notes saved with it."""

    step: int
    notes: dict[str, Any]


class CheckpointStore:
    """The checkpoints below `prefix` of `storage`. All ranks make one, and call its methods together, in the same order.

    Plain tensors and all other values must be equal on all ranks; DTensors are saved by the ranks that hold their parts.
    `scratch` is a local folder, the same for all ranks of a machine; below it, `checkpoints/` is the store's own.
    """

    def __init__(
        self,
        storage: Storage,
        prefix: str,
        *,
        say: Callable[[str], None],
        scratch: Path,
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen, so one shared default is safe
        keep_last: int = 2,
        keep_every_steps: int | None = None,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; at least one checkpoint must stay")
        self._storage, self._prefix, self._say = storage, prefix.rstrip("/"), say
        self._scratch = scratch / "checkpoints"
        self._ranks = _own_group(ranks)
        self._keep_last, self._keep_every_steps = keep_last, keep_every_steps
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._stager: Any = None
        self._in_flight: Future[None] | None = None
        self._failure: StorageError | None = None  # why the newest save failed
        self._failures_in_a_row = 0
        self._damaged: set[int] = set()

    def save(self, step: int, parts: Mapping[str, Stateful], *, notes: Mapping[str, Any]) -> None:
        """Saves `parts` and `notes` (JSON) after optimizer step `step`: copies them and returns, the rest goes on in the background.

        Waits for the save before it. One that fails is said on all ranks and training goes on; raises StorageError when two in
        a row have failed.
        """
        self._settle()
        if self._failure is not None and self._failures_in_a_row >= FAILURES_IN_A_ROW:
            raise self._failure
        document, tensors = take_apart({name: part.state_dict() for name, part in parts.items()})
        noted = json.loads(json.dumps(dict(notes)))
        self._in_flight = self._writer.submit(self._store, step, document, self._staged(tensors), noted)

    def wait(self) -> None:
        """Waits until nothing is in flight; raises StorageError when the newest save failed."""
        self._settle()
        if self._failure is not None:
            raise self._failure

    def restore(self, parts: Mapping[str, Stateful]) -> Restored | None:
        """Loads the newest sound checkpoint into `parts`; None when there is none.

        Damaged ones are said in one line each, and passed over by all ranks alike. Raises StorageError when the store cannot
        be read, which is no damage, and ValueError when the checkpoint holds other parts.
        """
        self._settle()
        found, complaints = None, []
        for step in together(self._ranks, self._begin_restoring)[0]:
            examined = examine(self._storage, self._prefix, step, scratch=self._scratch, ranks=self._ranks)
            if isinstance(examined, Commit):
                found = examined
                break
            complaints.append(examined)
            self._damaged.add(step)
        for complaint in complaints:
            instead = "training starts from nothing" if found is None else f"the checkpoint of step {found.step} is used instead"
            self._say_once(f"damaged checkpoint: {complaint}; {instead}")
        if found is None:
            return None
        together(self._ranks, lambda: self._load(found, parts))
        if self._ranks.local_rank == 0:
            shutil.rmtree(self._scratch, ignore_errors=True)
        self._say_once(f"resumed after step {found.step}")
        return Restored(found.step, found.notes)

    def clear(self) -> None:
        """Waits until nothing is in flight, and removes all checkpoints: the step's result is committed."""
        self._settle()
        if self._ranks.is_first:
            remove_below(self._storage, self._prefix)

    def _settle(self) -> None:
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def _staged(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Copies in memory of this process, pinned where there is CUDA; their buffers are used again by the next save."""
        import torch
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        if self._stager is None:
            cuda = torch.cuda.is_available()
            self._stager = DefaultStager(
                StagingOptions(use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda)
            )
        staged: dict[str, Any] = self._stager.stage(tensors)
        return staged

    def _store(self, step: int, document: Any, tensors: dict[str, Any], notes: dict[str, Any]) -> None:
        """Writes, stores and commits one checkpoint, in the background thread; what fails is said and counted."""
        attempt = self._ranks.from_first(f"attempt-{secrets.token_hex(4)}")
        folder = f"{step_folder(self._prefix, step)}/{attempt}"
        try:
            # All ranks learn here whether all of them have stored their files; a barrier would wait for one that has not.
            stored = together(self._ranks, lambda: self._write(folder, document, tensors))
            commit = Commit(
                step=step,
                attempt=attempt,
                files=tuple(file for part in stored for file in part),
                world_size=self._ranks.size,
                notes=notes,
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            together(self._ranks, lambda: self._commit(commit, folder) if self._ranks.is_first else None)
        except StorageError as error:
            self._failure, self._failures_in_a_row = error, self._failures_in_a_row + 1
            self._say(f"checkpoint of step {step} failed: {error}; training goes on, and the next checkpoint tries again")
            self._tidy(lambda: remove_below(self._storage, folder))
        else:
            self._failure, self._failures_in_a_row = None, 0
            self._tidy(
                lambda: remove_outdated(
                    self._storage, self._prefix, keep_last=self._keep_last, keep_every_steps=self._keep_every_steps, damaged=self._damaged
                )
            )
        if self._storage.local_path(folder) is None and self._ranks.local_rank == 0:
            shutil.rmtree(place_of(self._storage, folder, scratch=self._scratch), ignore_errors=True)

    def _write(self, folder: str, document: Any, tensors: dict[str, Any]) -> list[SavedFile]:
        """This rank's files, written and stored."""
        from model_core.training.checkpoint.files import write_files  # torch, for which other steps need not wait

        place = place_of(self._storage, folder, scratch=self._scratch)
        files = write_files(place, document, tensors, ranks=self._ranks)
        if self._storage.local_path(folder) is None:
            for file in files:
                if self._storage.upload(f"{folder}/{file.path}", place / file.path) != file.sha256:
                    raise StorageError(f"{place / file.path}: changed between writing and upload")
        elif self._ranks.is_first:
            for parent in (place, *place.parents[:3]):
                sync(parent)
        return files

    def _commit(self, commit: Commit, folder: str) -> None:
        """Makes the stored files a checkpoint; when another process has committed this step meanwhile, theirs stands."""
        for file in commit.files:
            size = self._storage.stat(f"{folder}/{file.path}").size
            if size != file.bytes:
                raise StorageError(f"{self._storage.uri}/{folder}/{file.path}: found {size} bytes where {file.bytes} were written")
        path = f"{step_folder(self._prefix, commit.step)}/{COMMIT}"
        if commit.step in self._damaged:  # known since it was passed over; the same step has been reached again
            self._storage.delete(path)
            self._damaged.discard(commit.step)
        try:
            self._storage.put(path, commit.to_bytes(), create_only=True)
        except ConflictError:
            self._say(f"checkpoint of step {commit.step}: another process has committed one meanwhile, which stands")
            self._tidy(lambda: remove_below(self._storage, folder))

    def _tidy(self, removal: Callable[[], None]) -> None:
        """Removes what nobody needs; a failure is said, and the next commit tries again."""
        if self._ranks.is_first:
            try:
                removal()
            except (StorageError, ValueError) as error:  # ValueError: of a commit that was damaged since
                self._say(f"old checkpoints cannot be removed: {error}")

    def _begin_restoring(self) -> list[int]:
        """Committed steps, the newest first (on rank 0). Empties the scratch folder of what a killed process has left."""
        if self._ranks.local_rank == 0:
            shutil.rmtree(self._scratch, ignore_errors=True)
        return committed_steps(self._storage, self._prefix)[::-1] if self._ranks.is_first else []

    def _load(self, commit: Commit, parts: Mapping[str, Stateful]) -> None:
        from model_core.training.checkpoint.files import read_document, read_tensors

        place = place_of(self._storage, f"{step_folder(self._prefix, commit.step)}/{commit.attempt}", scratch=self._scratch)
        document = read_document(place)
        if set(document) != set(parts):
            raise ValueError(f"checkpoint of step {commit.step}: holds {', '.join(sorted(document))}; found {', '.join(sorted(parts))}")
        _, templates = take_apart({name: part.state_dict() for name, part in parts.items()})
        state = put_together(document, read_tensors(place, templates, ranks=self._ranks))
        for name, part in parts.items():
            part.load_state_dict(state[name])

    def _say_once(self, message: str) -> None:
        if self._ranks.is_first:
            self._say(message)


def _own_group(ranks: Ranks) -> Ranks:
    """The same ranks with a process group for checkpoints alone: what the background thread says must not meet the training's."""
    if ranks.size == 1:
        return ranks
    import torch.distributed as dist

    return dataclasses.replace(ranks, group=dist.new_group(backend="gloo", timeout=PATIENCE))
