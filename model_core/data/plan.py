"""Which samples a batch holds: a pure function of (seed, sizes, shares, batch number). Nothing is carried from batch to batch.

Samples are numbered on through the whole stage. The kind of number n follows from an integer low-discrepancy schedule, so
that after any n each kind has had its share to within one sample; the j-th sample of a kind is entry j mod N of the keyed
permutation of epoch j div N. Restarts, ranks and workers change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from model_core.data.keys import keyed_generator
from model_core.recipe import UserError


@dataclass(frozen=True)
class Draw:
    """One sample of a batch: row `row` of the rows of `kind`, for the `epoch`-th time."""

    kind: str
    row: int
    epoch: int


@dataclass(frozen=True)
class Plan:
    """The order of samples of one stage.

    `sizes`: rows a kind; `shares`: share of the samples a kind, which sum to 1; kinds without rows may have no share.
    """

    seed: int
    stage: str
    sizes: Mapping[str, int]
    shares: Mapping[str, Fraction]
    batch_size: int

    def batch(self, number: int) -> list[Draw]:
        """The samples of global batch `number` (from 0)."""
        return [self._draw(n) for n in range(number * self.batch_size, (number + 1) * self.batch_size)]

    def _draw(self, n: int) -> Draw:
        kind, index = schedule(n, self.shares)
        epoch, position = divmod(index, self.sizes[kind])
        return Draw(kind, int(permutation(self.seed, self.stage, kind, epoch, self.sizes[kind])[position]), epoch)


def make_plan(*, seed: int, stage: str, sizes: Mapping[str, int], shares: Mapping[str, float], batch_size: int) -> Plan:
    """A plan over the kinds that have rows: shares of kinds without rows go to the others in proportion.

    Raises UserError when no kind with a share has rows.
    """
    exact = {
        kind: Fraction(share).limit_denominator(10_000) for kind, share in sorted(shares.items()) if share > 0 and sizes.get(kind, 0) > 0
    }
    total = sum(exact.values(), Fraction(0))
    if not total:
        raise UserError(f"stage {stage}: nothing to train on; its kinds hold {dict(sizes)} rows and its shares are {dict(shares)}")
    return Plan(seed, stage, dict(sizes), {kind: share / total for kind, share in exact.items()}, batch_size)


def schedule(n: int, shares: Mapping[str, Fraction]) -> tuple[str, int]:
    """(kind of sample number n, how many of that kind came before it).

    Kinds take turns in order: the first is due whenever floor(n s) steps up, the next shares out what is left in the same
    way, and so on. Counts differ from n s by less than one for the first kind, and by less than two for the rest.
    """
    kinds = list(shares)
    left = Fraction(1)
    for kind in kinds[:-1]:
        share = shares[kind] / left
        before = n * share.numerator // share.denominator
        if (n + 1) * share.numerator // share.denominator > before:
            return kind, before
        n -= before
        left -= shares[kind]
    return kinds[-1], n


@lru_cache(maxsize=64)
def permutation(seed: int, stage: str, kind: str, epoch: int, size: int) -> np.ndarray:
    """The order of `size` rows in an epoch: (size,) int64, keyed by all arguments."""
    return keyed_generator(seed, stage, kind, epoch, "order").permutation(size)
