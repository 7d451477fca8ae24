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

MODULUS = 1 << 8 * ID_BYTES
FILE_NAME = "ledger.json"


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
    """What all ranks have used, as of the last `joined`, and what this rank has used since."""

    def __init__(self) -> None:
        self.epochs: dict[tuple[str, int], Tally] = {}
        self.steps: list[Tally] = []
        self.quarantined: set[int] = set()
        self._own_epochs: dict[tuple[str, int], Tally] = {}
        self._own_steps: list[Tally] = []

    def add(self, ids: Mapping[tuple[str, int], Sequence[bytes]]) -> None:
        """Counts this rank's samples of one optimizer step, by kind and epoch."""
        step = Tally()
        for key, members in ids.items():
            mine = tally(members)
            self._own_epochs[key] = self._own_epochs.get(key, Tally()) + mine
            step += mine
        self._own_steps.append(step)

    def join(self, ranks: Ranks, quarantined: Sequence[int] = ()) -> None:
        """Adds up what the ranks have used since the last time, on every rank. All must call it after the same step."""
        told = ranks.gather((self._own_epochs, self._own_steps, list(quarantined)))
        for epochs, _, bad in told:
            self.quarantined.update(bad)
            for key, mine in epochs.items():
                self.epochs[key] = self.epochs.get(key, Tally()) + mine
        self.steps += [sum(parts, Tally()) for parts in zip(*(steps for _, steps, _ in told), strict=True)]
        self._own_epochs, self._own_steps = {}, []

    def state_dict(self) -> dict[str, Any]:
        """The joined ledger as JSON values."""
        return {
            "epochs": [{"kind": kind, "epoch": epoch, **_encode(self.epochs[kind, epoch])} for kind, epoch in sorted(self.epochs)],
            "steps": [_encode(step) for step in self.steps],
            "quarantined": sorted(self.quarantined),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self.epochs = {(entry["kind"], entry["epoch"]): _decode(entry) for entry in state["epochs"]}
        self.steps = [_decode(entry) for entry in state["steps"]]
        self.quarantined = set(state["quarantined"])
        self._own_epochs, self._own_steps = {}, []


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

    Whole epochs are held against the index alone; of an epoch that was begun, and where row groups are in quarantine, the ids
    that the plan names are read again.
    """
    problems = []
    num = len(ledger.steps)
    if sum(ledger.steps, Tally()) != sum(ledger.epochs.values(), Tally()):
        problems.append("its steps do not add up to its epochs")
    counts = kind_counts(num * plan.batch_size, plan.shares)
    expected_keys = {(kind, epoch) for kind, count in counts.items() for epoch in range(-(-count // plan.rows[kind].total))}
    for kind, epoch in sorted(expected_keys | set(ledger.epochs)):
        found = ledger.epochs.get((kind, epoch), Tally())
        total = plan.rows[kind].total if kind in plan.rows else 0
        used = min(total, max(0, counts.get(kind, 0) - epoch * total))
        expected = _expected(ledger, plan, groups, kind, epoch, used)
        if found != expected:
            problems.append(
                f"epoch {epoch} of {kind}: found {found.count} samples with id sum {found.id_sum:032x}; "
                f"expected are {expected.count} with {expected.id_sum:032x}"
            )
    return problems


def _expected(ledger: Ledger, plan: Plan, groups: RowGroups[LatentGroup], kind: str, epoch: int, used: int) -> Tally:
    if kind not in plan.rows or not used:
        return Tally()
    rows = plan.rows[kind]
    if used == rows.total and not ledger.quarantined.intersection(rows.groups.tolist()):
        return Tally(rows.total, groups.index.id_sum(rows.groups))
    numbers, inside = plan.locate(kind, epoch, np.arange(used))
    ids: list[bytes] = []
    for number in np.unique(numbers).tolist():
        group = None if number in ledger.quarantined else groups.get(number)
        if group is not None:
            ids += [group.sample_ids[row] for row in inside[numbers == number].tolist()]
    return tally(ids)


def _encode(entry: Tally) -> dict[str, Any]:
    return {"count": entry.count, "id_sum": f"{entry.id_sum:032x}"}


def _decode(entry: Mapping[str, Any]) -> Tally:
    return Tally(int(entry["count"]), int(entry["id_sum"], 16))
