"""How often a stage's row groups will be fetched, before there are any: the cost of docs/decisions/0010, in numbers."""

from __future__ import annotations

import math
from statistics import NormalDist


def row_group_reads(*, samples: float, rows: int, window: int, ranks: float) -> float:
    """Fetches that `ranks` together make for one global batch with `samples` of one kind, `rows` of them a row group.

    `window` row groups are open at a time. The batch's rows of a window are sorted by row group and cut into the ranks' slices: one
    fetch a row group, and one more at each cut. When a window lasts n > 1 batches of B samples, a cut's place varies from batch to batch,
    since a batch is a random part of the window: by W sqrt(p (1 - p) / B (1 - 1/n)) row groups at the share p of the ranks, on average
    pi / 8 of W / sqrt(B). A rank fetches what its cuts sweep over: the range of n normal variables (Blom 1958).
    """
    groups, cuts = samples / rows, max(ranks - 1.0, 0.0)
    lasts = window / groups
    if lasts <= 1:
        return groups + cuts
    spread = math.pi / 8 * window * math.sqrt((1 - 1 / lasts) / samples)
    swept = 2 * NormalDist().inv_cdf((max(lasts, 2.0) - 0.375) / (max(lasts, 2.0) + 0.25)) * spread
    return min((window + cuts * (1 + swept)) / lasts, groups * max(ranks, 1.0))
