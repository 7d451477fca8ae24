"""The data plan against brute force: shares, exactly-once epochs, purity."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_core.data.plan import make_plan, schedule
from model_core.recipe import UserError

SHARES = {"edit": Fraction(3, 10), "image": Fraction(13, 20), "text_image": Fraction(1, 20)}


def test_each_kind_has_its_share_after_any_number_of_samples():
    counts: Counter[str] = Counter()
    for n in range(5000):
        kind, before = schedule(n, SHARES)
        assert before == counts[kind]
        counts[kind] += 1
        for name, share in SHARES.items():
            assert abs(counts[name] - (n + 1) * share) < 2


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 17), st.integers(0, 2**40))
def test_an_epoch_of_a_kind_holds_each_of_its_rows_once(images, edits, batch_size, seed):
    plan = make_plan(
        seed=seed, stage="S1", sizes={"image": images, "edit": edits}, shares={"image": 0.5, "edit": 0.5}, batch_size=batch_size
    )
    draws = [draw for number in range(200 // batch_size + 1) for draw in plan.batch(number)]
    for kind, size in (("image", images), ("edit", edits)):
        rows = [(draw.epoch, draw.row) for draw in draws if draw.kind == kind]
        for epoch in range(len(rows) // size):
            assert sorted(row for e, row in rows if e == epoch) == list(range(size))


def test_a_batch_does_not_depend_on_those_asked_for_before_it():
    arguments = {"seed": 7, "stage": "S2", "sizes": {"image": 30}, "shares": {"image": 1.0}, "batch_size": 8}
    in_turn = [make_plan(**arguments).batch(number) for number in range(20)]
    assert make_plan(**arguments).batch(13) == in_turn[13]
    assert make_plan(**{**arguments, "seed": 8}).batch(13) != in_turn[13]


def test_the_order_of_samples_does_not_depend_on_the_batch_size():
    def order(batch_size: int) -> list:
        plan = make_plan(seed=1, stage="S1", sizes={"image": 11, "edit": 5}, shares={"image": 0.7, "edit": 0.3}, batch_size=batch_size)
        return [draw for number in range(60 // batch_size) for draw in plan.batch(number)]

    assert order(4) == order(6)


def test_the_share_of_a_kind_without_rows_goes_to_the_others():
    plan = make_plan(seed=0, stage="S1", sizes={"image": 3, "edit": 0}, shares={"image": 0.7, "edit": 0.3}, batch_size=10)
    assert {draw.kind for draw in plan.batch(0)} == {"image"}


def test_a_stage_without_rows_is_refused():
    with pytest.raises(UserError, match="nothing to train on"):
        make_plan(seed=0, stage="S1", sizes={"image": 0}, shares={"image": 1.0}, batch_size=1)
