"""Which samples a batch holds: a pure function of (index digest, seed, stage, batch number). Nothing is carried over.

Samples are numbered on through the whole stage; global batch g holds numbers g B to (g + 1) B - 1. The kind of number n
follows from an integer low-discrepancy schedule, so that after any n each kind has had its share to within two samples. The
j-th sample of a kind is place j mod N of the order of epoch j div N, N being the kind's rows. That order is a block shuffle: row
groups are permuted, windows of some of them in turn are opened, and the rows of a window are permuted. So a row group is read
once an epoch, and memory holds windows, not epochs. Every permutation is keyed; restarts, ranks and workers change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from model_core.data.keys import keyed_permutation
from model_core.documents import UserError


@dataclass(frozen=True)
class Samples:
    """Samples in the order of a batch, as parallel arrays (B,): number of the row group in the index, row in it, epoch; kind."""

    kinds: np.ndarray
    groups: np.ndarray
    rows: np.ndarray
    epochs: np.ndarray

    def __len__(self) -> int:
        return len(self.groups)

    def take(self, chosen: np.ndarray | slice) -> Samples:
        """Some of them."""
        return Samples(self.kinds[chosen], self.groups[chosen], self.rows[chosen], self.epochs[chosen])


@dataclass(frozen=True, eq=False)
class Rows:
    """The row groups of one kind: their numbers in the index, and how many rows each has; both (G,)."""

    groups: np.ndarray
    counts: np.ndarray

    @property
    def total(self) -> int:
        """Rows of the kind."""
        return int(self.counts.sum(dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of samples of one stage. `window` counts the row groups that are open at a time, a kind."""

    digest: str
    seed: int
    stage: str
    rows: Mapping[str, Rows]
    shares: Mapping[str, Fraction]
    batch_size: int
    window: int

    @property
    def kinds(self) -> list[str]:
        """The kinds that have a share; `Samples.kinds` counts in this order."""
        return list(self.shares)

    def batch(self, number: int) -> Samples:
        """The samples of global batch `number` (from 0)."""
        return self.numbered(np.arange(number * self.batch_size, (number + 1) * self.batch_size))

    def share(self, number: int, *, rank: int, size: int) -> Samples:
        """What rank `rank` of `size` takes of a global batch.

        Samples are dealt out by row group, so that a rank opens few of a window; shares differ by at most one sample.
        """
        samples = self.batch(number)
        order = np.lexsort((samples.rows, samples.groups, samples.kinds))
        return samples.take(order[rank * len(order) // size : (rank + 1) * len(order) // size])

    def numbered(self, numbers: np.ndarray) -> Samples:
        """The samples of these numbers, (n,) int64 each."""
        kinds, positions = schedule(numbers, self.shares)
        groups, rows, epochs = (np.empty(len(numbers), dtype=np.int64) for _ in range(3))
        for index, kind in enumerate(self.kinds):
            mine = np.flatnonzero(kinds == index)
            epochs[mine] = positions[mine] // self.rows[kind].total
            for epoch in np.unique(epochs[mine]):
                here = mine[epochs[mine] == epoch]
                groups[here], rows[here] = self.locate(kind, int(epoch), positions[here] - epoch * self.rows[kind].total)
        return Samples(kinds, groups, rows, epochs)

    def locate(self, kind: str, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row groups, rows in them) at these places of an epoch's order, each (n,)."""
        _, ends = self.epoch(kind, epoch)
        windows = np.searchsorted(ends, places, side="right")
        groups, rows = np.empty(len(places), dtype=np.int64), np.empty(len(places), dtype=np.int64)
        for window in np.unique(windows):
            mine = windows == window
            start = ends[window - 1] if window else 0
            members, inside = self._window(kind, epoch, int(window))
            groups[mine], rows[mine] = self.rows[kind].groups[members[places[mine] - start]], inside[places[mine] - start]
        return groups, rows

    @lru_cache(maxsize=16)  # noqa: B019 - a plan lives as long as its stage
    def epoch(self, kind: str, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the kind's row groups, (G,) into `rows[kind]`, and the place at which each window ends."""
        rows = self.rows[kind]
        order = keyed_permutation(len(rows.groups), self.digest, self.seed, self.stage, kind, epoch, "row groups")
        ends = np.cumsum(rows.counts[order], dtype=np.int64)
        last = np.minimum(np.arange(self.window, len(order) + self.window, self.window), len(order)) - 1
        return order, ends[last]

    @lru_cache(maxsize=64)  # noqa: B019
    def _window(self, kind: str, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """A window's rows in their order: (row group, as a number in `rows[kind]`; row in it), each (rows of the window,)."""
        order, _ = self.epoch(kind, epoch)
        members = order[window * self.window : (window + 1) * self.window]
        counts = self.rows[kind].counts[members].astype(np.int64)
        owners = np.repeat(members, counts)
        inside = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
        shuffled = keyed_permutation(len(owners), self.digest, self.seed, self.stage, kind, epoch, window, "rows")
        return owners[shuffled], inside[shuffled]


def make_plan(
    *, digest: str, seed: int, stage: str, rows: Mapping[str, Rows], shares: Mapping[str, float], batch_size: int, window: int
) -> Plan:
    """A plan over the kinds that have rows: shares of kinds without rows go to the others in proportion.

    Raises UserError when no kind with a share has rows.
    """
    sizes = {kind: members.total for kind, members in rows.items()}
    exact = {
        kind: Fraction(share).limit_denominator(10_000) for kind, share in sorted(shares.items()) if share > 0 and sizes.get(kind, 0) > 0
    }
    total = sum(exact.values(), Fraction(0))
    if not total:
        raise UserError(f"stage {stage}: nothing to train on; its kinds hold {sizes} rows and its shares are {dict(shares)}")
    return Plan(digest, seed, stage, dict(rows), {kind: share / total for kind, share in exact.items()}, batch_size, window)


def schedule(numbers: np.ndarray, shares: Mapping[str, Fraction]) -> tuple[np.ndarray, np.ndarray]:
    """For samples of these numbers, (n,) int64: which kind each is of, and how many of that kind came before it.

    Kinds take turns in order: the first is due whenever floor(n s) steps up, the next shares out what is left in the same
    way, and so on. Counts differ from n s by less than one for the first kind, and by less than two for the rest.
    """
    kinds, positions = np.full(len(numbers), len(shares) - 1), numbers.astype(np.int64)
    open_ = np.arange(len(numbers))
    left = Fraction(1)
    for index, share in enumerate(list(shares.values())[:-1]):
        part = share / left
        n = positions[open_]
        before = _floor_product(n, part)
        due = _floor_product(n + 1, part) > before
        kinds[open_[due]], positions[open_[due]] = index, before[due]
        positions[open_[~due]] = (n - before)[~due]
        open_ = open_[~due]
        left -= share
    return kinds, positions


def kind_counts(num: int, shares: Mapping[str, Fraction]) -> dict[str, int]:
    """How many of the samples 0 to `num` - 1 are of each kind."""
    counts: dict[str, int] = {}
    left = Fraction(1)
    for kind, share in shares.items():
        counts[kind] = int(num * share / left)  # the last kind's share is all that is left
        num -= counts[kind]
        left -= share
    return counts


def _floor_product(n: np.ndarray, share: Fraction) -> np.ndarray:
    """floor(n share), exact also where n times the numerator would not fit 64 bits."""
    whole, rest = np.divmod(n, share.denominator)
    return whole * share.numerator + rest * share.numerator // share.denominator
