"""Work that all ranks do, and of which all learn whether it failed on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from model_core.storage import StorageError
from model_core.training.distributed import Ranks

Value = TypeVar("Value")


def together(ranks: Ranks, work: Callable[[], Value]) -> list[Value]:
    """The results of `work` on all ranks, in their order. All must call it, and none waits for one that failed.

    Raises StorageError on every rank when `work` met a store's or a file system's error on one; a rank whose `work` raised
    anything else raises that itself, and the others a StorageError.
    """
    value, failure = None, None
    try:
        value = work()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait to hear of it
        failure = error
    told = ranks.gather((value, None if failure is None else str(failure) or type(failure).__name__))
    failures = [text if ranks.size == 1 else f"rank {rank}: {text}" for rank, (_, text) in enumerate(told) if text is not None]
    if failure is not None and not isinstance(failure, StorageError | OSError):
        raise failure
    if failures:
        raise StorageError("; ".join(failures)) from failure
    return [value for value, _ in told]  # type: ignore[misc]
