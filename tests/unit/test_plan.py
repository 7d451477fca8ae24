"""The data plan against brute force: shares, exactly-once epochs, purity, slices, and a very large index."""

import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_core.data.plan import Plan, Rows, kind_counts, make_plan, schedule
from model_core.documents import UserError

SHARES = {"edit": Fraction(3, 10), "image": Fraction(13, 20), "text_image": Fraction(1, 20)}


def rows_of(*counts: int, first: int = 0) -> Rows:
    return Rows(np.arange(first, first + len(counts)), np.array(counts, dtype=np.int32))


def plan_of(rows: dict[str, Rows], *, shares=None, batch_size=8, window=2, seed=1, digest="index") -> Plan:
    shares = shares or {kind: 1 / len(rows) for kind in rows}
    return make_plan(digest=digest, seed=seed, stage="S1", rows=rows, shares=shares, batch_size=batch_size, window=window)


def listed(samples) -> list[tuple[int, int, int, int]]:
    columns = (samples.kinds, samples.groups, samples.rows, samples.epochs)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_each_kind_has_its_share_after_any_number_of_samples():
    kinds, positions = schedule(np.arange(5000), SHARES)
    counts: Counter[int] = Counter()
    for n, (kind, before) in enumerate(zip(kinds.tolist(), positions.tolist(), strict=True)):
        assert before == counts[kind]
        counts[kind] += 1
        for index, share in enumerate(SHARES.values()):
            assert abs(counts[index] - (n + 1) * share) < 2
        assert list(kind_counts(n + 1, SHARES).values()) == [counts[index] for index in range(3)]


def test_the_schedule_is_exact_at_numbers_beyond_a_billion():
    n = 7 * 10**12 + 5
    _, positions = schedule(np.array([n]), {"a": Fraction(1, 3), "b": Fraction(2, 3)})
    assert positions.tolist() in ([n // 3], [n - n // 3])


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=7),
    st.lists(st.integers(1, 9), min_size=1, max_size=7),
    st.integers(1, 17),
    st.integers(1, 4),
    st.integers(0, 2**40),
)
def test_an_epoch_of_a_kind_holds_each_of_its_rows_once(images, edits, batch_size, window, seed):
    rows = {"image": rows_of(*images), "edit": rows_of(*edits, first=len(images))}
    plan = plan_of(rows, batch_size=batch_size, window=window, seed=seed)
    drawn = [sample for number in range(300 // batch_size + 1) for sample in listed(plan.batch(number))]
    for index, kind in enumerate(plan.kinds):
        members = rows[kind]
        every = sorted((g, r) for g, count in zip(members.groups.tolist(), members.counts.tolist(), strict=True) for r in range(count))
        mine = [(epoch, group, row) for found, group, row, epoch in drawn if found == index]
        for epoch in range(len(mine) // members.total):
            assert sorted((group, row) for e, group, row in mine if e == epoch) == every


def test_an_epoch_opens_a_window_of_row_groups_at_a_time():
    plan = plan_of({"image": rows_of(*[5] * 12)}, batch_size=15, window=3)
    for number in range(4):
        assert len(set(plan.batch(number).groups.tolist())) == 3
    assert sorted(g for number in range(4) for g in set(plan.batch(number).groups.tolist())) == list(range(12))


def test_epochs_windows_and_rows_come_in_another_order_each_time():
    plan = plan_of({"image": rows_of(*[5] * 12)}, batch_size=60, window=3)
    first, second = plan.batch(0), plan.batch(1)
    assert first.groups.tolist() != second.groups.tolist()
    inside = [first.rows[first.groups == group].tolist() for group in range(12)]
    assert len({tuple(order) for order in inside}) > 6


def test_a_batch_does_not_depend_on_those_asked_for_before_it():
    rows = {"image": rows_of(4, 4, 3)}
    in_turn = [listed(plan_of(rows).batch(number)) for number in range(20)]
    assert listed(plan_of(rows).batch(13)) == in_turn[13]
    assert listed(plan_of(rows, seed=2).batch(13)) != in_turn[13]
    assert listed(plan_of(rows, digest="another").batch(13)) != in_turn[13]


def test_the_order_of_samples_does_not_depend_on_the_batch_size():
    def order(batch_size: int) -> list:
        plan = plan_of({"image": rows_of(4, 4, 3), "edit": rows_of(3, 2, first=3)}, batch_size=batch_size)
        return [sample for number in range(60 // batch_size) for sample in listed(plan.batch(number))]

    assert order(4) == order(6)


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 30))
def test_the_ranks_shares_are_the_batch_whatever_their_number(size, batch_size, number):
    plan = plan_of({"image": rows_of(4, 4, 3), "edit": rows_of(3, 2, first=3)}, batch_size=batch_size)
    shares = [plan.share(number, rank=rank, size=size) for rank in range(size)]
    assert sorted(sample for share in shares for sample in listed(share)) == sorted(listed(plan.batch(number)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_rank_opens_few_row_groups_of_a_window():
    plan = plan_of({"image": rows_of(*[64] * 64)}, batch_size=256, window=8)
    assert [len(set(plan.share(0, rank=rank, size=8).groups.tolist())) for rank in range(8)] <= [2] * 8


def test_the_share_of_a_kind_without_rows_goes_to_the_others():
    plan = plan_of({"image": rows_of(3), "edit": rows_of()}, shares={"image": 0.7, "edit": 0.3})
    assert plan.shares == {"image": 1}


def test_a_stage_without_rows_is_refused():
    with pytest.raises(UserError, match="nothing to train on"):
        plan_of({"image": rows_of()})


def test_a_billion_samples_answer_for_any_batch_number():
    plan = plan_of({"image": rows_of(*[500] * 1), "edit": Rows(np.arange(1, 2_000_001), np.full(2_000_000, 500, np.int32))}, batch_size=64)
    began = time.monotonic()
    samples = plan.batch(12_345_678)
    assert time.monotonic() - began < 20  # seconds, not hours: benchmarks/data.py measures how many
    assert samples.groups.max() < 2_000_001
    assert samples.rows.max() < 500
