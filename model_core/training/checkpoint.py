"""Checkpoints of a training step: written beside the result, committed last, verified before they are read.

A checkpoint is `step-00000100/state.pt` and `step-00000100/COMMIT.json`, which holds the size and sha256 of the state and
is created only once the state is stored. One without a commit, or whose state does not match it, is passed over.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from model_core.storage import ConflictError, NotFoundError, Storage

KEEP = 2  # the newest, and one more for the case that the newest is damaged


class Stateful(Protocol):
    """What a checkpoint holds by name: a model, an optimizer, curves."""

    def state_dict(self) -> dict[str, Any]:
        """All that must be known to go on."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Takes up what `state_dict` gave."""


def states_of(parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """The state of each part, by its name."""
    return {name: part.state_dict() for name, part in parts.items()}


class CheckpointStore:
    """The checkpoints of one step's key."""

    def __init__(self, storage: Storage, prefix: str, say: Callable[[str], None]) -> None:
        self._storage, self._prefix, self._say = storage, prefix.rstrip("/"), say

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Stores `state` (nested dicts and lists of tensors, numbers and strings) after optimizer step `step`."""
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        folder = self._folder(step)
        # A state without its commit is of an attempt that died while writing it.
        self._storage.put(f"{folder}/state.pt", data)
        commit = {"step": step, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        try:
            self._storage.put(f"{folder}/COMMIT.json", json.dumps(commit, sort_keys=True).encode(), create_only=True)
        except ConflictError:
            self._storage.put(f"{folder}/COMMIT.json", json.dumps(commit, sort_keys=True).encode())
        for old in self._steps()[:-KEEP]:
            self._remove(old)

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest valid checkpoint as (optimizer step, state), or None; damaged ones are reported and passed over."""
        import torch

        for step in reversed(self._steps()):
            data = self._read(step)
            if data is None:
                self._say(f"checkpoint of step {step} is damaged; the one before it is used")
                continue
            # Only bytes that match our own commit get here, and weights_only admits tensors and plain containers alone.
            return step, torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return None

    def restore(self, parts: Mapping[str, Stateful]) -> int:
        """Loads the newest valid checkpoint into `parts`, each by its name; returns its step, which is 0 when there is none."""
        found = self.latest()
        if found is None:
            return 0
        step, state = found
        for name, part in parts.items():
            part.load_state_dict(state[name])
        self._say(f"resumed after step {step}")
        return step

    def clear(self) -> None:
        """Removes all checkpoints: the step's result is committed."""
        for entry in list(self._storage.list(f"{self._prefix}/")):
            self._storage.delete(entry.path)

    def _read(self, step: int) -> bytes | None:
        try:
            commit = json.loads(self._storage.get(f"{self._folder(step)}/COMMIT.json"))
            data = self._storage.get(f"{self._folder(step)}/state.pt")
        except (NotFoundError, ValueError):
            return None
        return data if hashlib.sha256(data).hexdigest() == commit.get("sha256") else None

    def _steps(self) -> list[int]:
        """Committed steps in rising order."""
        names = [entry.path.removeprefix(f"{self._prefix}/").split("/") for entry in self._storage.list(f"{self._prefix}/")]
        return sorted(int(name[0].removeprefix("step-")) for name in names if len(name) == 2 and name[1] == "COMMIT.json")

    def _remove(self, step: int) -> None:
        # The commit goes first, so that no reader trusts a folder that is being emptied.
        self._storage.delete(f"{self._folder(step)}/COMMIT.json")
        self._storage.delete(f"{self._folder(step)}/state.pt")

    def _folder(self, step: int) -> str:
        return f"{self._prefix}/step-{step:08d}"
