"""The proof of what a stage has trained on: which samples, how often, and that none was lost or met twice in an epoch.

After each optimizer step the ids used are added up, as a count and a sum mod 2^128, which do not depend on their order: a kind
and epoch each, and a step each. Ranks keep their own sums; they are joined when a checkpoint is made. At an epoch's end
the sum must equal the index's; of an epoch that was begun, the plan tells which samples it must hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model_core.data.index import ID_BYTES, sum_ids
from model_core.data.latents import LatentGroup
from model_core.data.plan import Plan, kind_counts
from model_core.data.row_groups import RowGroups
from model_core.training.distributed import Ranks

Key = tuple[str, int]  # kind and epoch
MODULUS = 1 << 8 * ID_BYTES
FILE_NAME = "ledger.json"
FORMAT = "darkroom-ledger-1"


class LedgerError(Exception):
    """Samples were lost or met twice."""


@dataclass(frozen=True)
class Tally:
    """Some samples: how many, and the sum of their ids mod 2^128."""

    count: int = 0
    id_sum: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.count + other.count, (self.id_sum + other.id_sum) % MODULUS)


def tally(ids: Sequence[bytes]) -> Tally:
    """The tally of these ids."""
    return Tally(len(ids), sum_ids(ids))


class Ledger:
    """What all ranks have used, as of the last `join`, and what this rank has used since.

    `missing` are the samples that the plan names and that were left out, as they lie in quarantined row groups: row groups and
    rows, by kind and epoch.
    """

    def __init__(self) -> None:
        self.epochs: dict[Key, Tally] = {}
        self.missing: dict[Key, dict[int, set[int]]] = {}
        self.steps: list[Tally] = []
        self._forget_own()

    def add(self, ids: Mapping[Key, Sequence[bytes]], missing: Mapping[Key, Sequence[tuple[int, int]]] | None = None) -> None:
        """Counts this rank's samples of one optimizer step, by kind and epoch, and notes those that it had to leave out."""
        step = Tally()
        for key, members in ids.items():
            mine = tally(members)
            self._own_epochs[key] = self._own_epochs.get(key, Tally()) + mine
            step += mine
        self._own_steps.append(step)
        self._own_missing += [(key, group, row) for key, places in (missing or {}).items() for group, row in places]

    def join(self, ranks: Ranks) -> None:
        """Adds up what the ranks have used since the last time, on every rank. All must call it after the same step."""
        told = ranks.gather((self._own_epochs, self._own_steps, self._own_missing))
        for epochs, _, missing in told:
            for key, mine in epochs.items():
                self.epochs[key] = self.epochs.get(key, Tally()) + mine
            for key, group, row in missing:
                self.missing.setdefault(key, {}).setdefault(group, set()).add(row)
        self.steps += [sum(parts, Tally()) for parts in zip(*(steps for _, steps, _ in told), strict=True)]
        self._forget_own()

    @property
    def num_missing(self) -> int:
        """How many times a sample was left out."""
        return sum(len(rows) for groups in self.missing.values() for rows in groups.values())

    def state_dict(self) -> dict[str, Any]:
        """The joined ledger as JSON values."""
        return {
            "epochs": [{"kind": kind, "epoch": epoch, **_encode(self.epochs[kind, epoch])} for kind, epoch in sorted(self.epochs)],
            "steps": [_encode(step) for step in self.steps],
            "missing": [
                {"kind": kind, "epoch": epoch, "row_group": group, "rows": sorted(rows)}
                for (kind, epoch), groups in sorted(self.missing.items())
                for group, rows in sorted(groups.items())
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self.epochs = {(entry["kind"], entry["epoch"]): _decode(entry) for entry in state["epochs"]}
        self.steps = [_decode(entry) for entry in state["steps"]]
        self.missing = {}
        for entry in state["missing"]:
            self.missing.setdefault((entry["kind"], entry["epoch"]), {})[entry["row_group"]] = set(entry["rows"])
        self._forget_own()

    def _forget_own(self) -> None:
        self._own_epochs: dict[Key, Tally] = {}
        self._own_steps: list[Tally] = []
        self._own_missing: list[tuple[Key, int, int]] = []


def ledger_document(ledger: Ledger, plan: Plan) -> dict[str, Any]:
    """What `ledger.json` holds."""
    return {"format": FORMAT, "plan": plan_document(plan), **ledger.state_dict()}


def plan_document(plan: Plan) -> dict[str, Any]:
    """What a plan is made of, beside the index that it names."""
    return {
        "index": plan.digest,
        "seed": plan.seed,
        "stage": plan.stage,
        "shares": {kind: [share.numerator, share.denominator] for kind, share in plan.shares.items()},
        "batch_size": plan.batch_size,
        "window": plan.window,
    }


def check_ledger(ledger: Ledger, plan: Plan, groups: RowGroups[LatentGroup]) -> list[str]:
    """What is wrong with a ledger, a sentence each; nothing when each sample was used just as often as the plan says.

    Whole row groups are held against the index alone. Of one that was used in part the ids that the plan names are read again;
    where that fails, the number of samples is all that can be checked.
    """
    problems = []
    num = len(ledger.steps)
    if sum(ledger.steps, Tally()) != sum(ledger.epochs.values(), Tally()):
        problems.append("its steps do not add up to its epochs")
    counts = kind_counts(num * plan.batch_size, plan.shares)
    planned = {(kind, epoch) for kind, count in counts.items() for epoch in range(-(-count // plan.rows[kind].total))}
    for kind, epoch in sorted(planned | set(ledger.epochs)):
        found, expected, is_exact = ledger.epochs.get((kind, epoch), Tally()), Tally(), True
        if (kind, epoch) in planned:
            used = min(plan.rows[kind].total, counts[kind] - epoch * plan.rows[kind].total)
            expected, is_exact = _expected(ledger.missing.get((kind, epoch), {}), plan, groups, kind, epoch, used)
        if found.count != expected.count or (is_exact and found != expected):
            problems.append(
                f"epoch {epoch} of {kind}: found {found.count} samples with id sum {found.id_sum:032x}; "
                f"expected are {expected.count} with {expected.id_sum:032x}"
            )
    return problems


def _expected(
    missing: Mapping[int, set[int]], plan: Plan, groups: RowGroups[LatentGroup], kind: str, epoch: int, used: int
) -> tuple[Tally, bool]:
    """The tally of the first `used` samples of an epoch without those that are missing, and whether its id sum is known."""
    order, ends = plan.epoch(kind, epoch)
    num_whole = int(np.searchsorted(ends, used, side="right"))  # windows that were used up
    whole = plan.rows[kind].groups[order[: num_whole * plan.window]]
    in_part = {int(group): set(range(int(groups.index.rows[group]))) for group in whole[np.isin(whole, list(missing))]}
    last, rows = plan.locate(kind, epoch, np.arange(ends[num_whole - 1] if num_whole else 0, used))
    for group, row in zip(last.tolist(), rows.tolist(), strict=True):
        in_part.setdefault(group, set()).add(row)
    untouched = whole[~np.isin(whole, list(missing))]
    total = Tally(int(groups.index.rows[untouched].sum(dtype=np.int64)), groups.index.id_sum(untouched))
    is_exact = True
    for number, planned in in_part.items():
        if left := planned - missing.get(number, set()):
            group = groups.get(number)
            total += Tally(len(left)) if group is None else tally([group.sample_ids[row] for row in left])
            is_exact = is_exact and group is not None
    return total, is_exact


def _encode(entry: Tally) -> dict[str, Any]:
    return {"count": entry.count, "id_sum": f"{entry.id_sum:032x}"}


def _decode(entry: Mapping[str, Any]) -> Tally:
    return Tally(int(entry["count"]), int(entry["id_sum"], 16))
