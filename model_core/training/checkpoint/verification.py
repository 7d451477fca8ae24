"""Whether a checkpoint is still what its commit says, found out by all ranks together before any of it is trusted."""

from __future__ import annotations

from pathlib import Path

from model_core.storage import CorruptError, NotFoundError, Storage
from model_core.training.checkpoint.agreement import together
from model_core.training.checkpoint.commit import COMMIT, Commit, read_commit, step_folder
from model_core.training.distributed import Ranks


def place_of(storage: Storage, folder: str, *, scratch: Path) -> Path:
    """The local folder for an attempt's files: where they lie, or one in `scratch` when the store is remote."""
    return storage.local_path(folder) or scratch / Path(folder).name


def examine(storage: Storage, prefix: str, step: int, *, scratch: Path, ranks: Ranks) -> Commit | str:
    """The commit of `step` when every file is as it says, or what is wrong, in one line that names the object. Collective.

    The ranks of a machine share out the files, and fetch those of a remote store, so each is read there once.
    Raises StorageError on all ranks when the store cannot be read.
    """
    found = together(ranks, lambda: _commit_of(storage, prefix, step) if ranks.is_first else None)[0]
    if not isinstance(found, Commit):
        assert found is not None, "rank 0 reads the commit"
        return found
    complaints = [text for text in together(ranks, lambda: _fetch(storage, prefix, found, scratch=scratch, ranks=ranks)) if text]
    return complaints[0] if complaints else found


def _commit_of(storage: Storage, prefix: str, step: int) -> Commit | str:
    path = f"{step_folder(prefix, step)}/{COMMIT}"
    try:
        commit = read_commit(storage, path)
    except (NotFoundError, ValueError) as error:
        return str(error)
    return commit if commit.step == step else f"{storage.uri}/{path}: is of step {commit.step}"


def _fetch(storage: Storage, prefix: str, commit: Commit, *, scratch: Path, ranks: Ranks) -> str | None:
    """Fetches and checks this rank's share of the files; says what is wrong with the first that is."""
    folder = f"{step_folder(prefix, commit.step)}/{commit.attempt}"
    place = place_of(storage, folder, scratch=scratch)
    for file in commit.files[ranks.local_rank :: ranks.local_size]:
        try:
            storage.download(f"{folder}/{file.path}", place / file.path, sha256=file.sha256)
        except (CorruptError, NotFoundError) as error:
            return str(error)
    return None
