"""Keyed randomness: every draw is a pure function of what it is for, never of what was drawn before it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


def key_bytes(*parts: object) -> bytes:
    """32 bytes that depend on every part and on where one part ends and the next begins."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def keyed_generator(*parts: object) -> np.random.Generator:
    """A counter-based generator (Philox) keyed by `parts`, such as (seed, sample id, epoch, "noise")."""
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key_bytes(*parts)[:16], dtype=np.uint64)))


def keyed_uniform(*parts: object) -> float:
    """A number in [0, 1) keyed by `parts`."""
    return int.from_bytes(key_bytes(*parts)[:8], "little") / 2.0**64


def keyed_permutation(size: int, *parts: object) -> np.ndarray:
    """An order of `size` things, (size,) int64, keyed by `parts`.

    Sorts the raw bits of Philox, which numpy keeps the same in all versions, as it does not its own shuffles.
    """
    bits = np.random.Philox(key=np.frombuffer(key_bytes(*parts)[:16], dtype=np.uint64)).random_raw(size)
    return np.argsort(bits, kind="stable")


def one_of(values: Sequence[Item], generator: np.random.Generator) -> Item:
    """One of the values, all equally likely."""
    return values[int(generator.integers(len(values)))]
