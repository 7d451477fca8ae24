"""Cached inputs in a site's scratch folder: a process that reads them says so by a lock, which the kernel drops when it dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from model_core.publication import is_at, remove_tree


def use_cache(folder: Path) -> int:
    """Makes a cache's folder and keeps others from removing it; returns the descriptor that holds the lock, until it is closed."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if is_at(descriptor, folder):
            return descriptor
        os.close(descriptor)  # it was removed while we waited


def remove_cache(folder: Path) -> bool:
    """Removes a cache's folder; False when a living process uses it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        remove_tree(folder)
        return True
    finally:
        os.close(descriptor)


def is_used(folder: Path) -> bool:
    """Whether a living process of this machine uses a cache's folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
