"""The ledger: what a brute-force count of ids says, in any order and on any ranks; and each kind of mistake is found."""

import json

import pytest

from model_core.data.folders import LocalFolder
from model_core.data.latents import latent_group, latent_rows
from model_core.data.loader import Draws, Loader
from model_core.data.plan import make_plan
from model_core.data.row_groups import RowGroups
from model_core.training.distributed import Ranks
from model_core.training.ledger import Ledger, Tally, check_ledger, tally
from tests.latent_sets import MODEL, sample_id, write_latents

IDS = [sample_id("image", number) for number in range(20)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    index = write_latents(root, {"image": 10, "edit": 6})
    groups = RowGroups(LocalFolder(root), index, latent_group, capacity=16, say=lambda line: None)
    plan = make_plan(
        digest=index.digest,
        seed=0,
        stage="S1",
        rows=latent_rows(index, kinds=("image", "edit")),
        shares={"image": 0.5, "edit": 0.5},
        batch_size=4,
        window=2,
    )
    return Loader(groups, plan, Draws((0.0, 1.0), 0.1, {"general": 1.0}), MODEL)


def filled(loader: Loader, num_steps: int) -> Ledger:
    ledger = Ledger()
    for batch in loader.stream(0, num_steps):
        ledger.add(batch.ids)
    ledger.join(Ranks())
    return ledger


def test_a_tally_does_not_depend_on_the_order_and_tells_sets_apart():
    assert tally(IDS) == tally(IDS[::-1])
    assert tally(IDS[:5]) + tally(IDS[5:]) == tally(IDS)
    assert tally(IDS[:-1] + IDS[:1]) != tally(IDS)
    assert tally([b"\xff" * 16] * 3).id_sum == (3 * (2**128 - 1)) % 2**128


@pytest.mark.parametrize("num_steps", [0, 1, 3, 5, 6, 17])
def test_an_honest_ledger_is_right_after_any_number_of_steps(made, num_steps):
    ledger = filled(made, num_steps)
    assert check_ledger(ledger, made.plan, made.groups) == []
    assert sum(ledger.steps, Tally()).count == 4 * num_steps


def test_a_ledger_survives_its_json(made):
    ledger, again = filled(made, 5), Ledger()
    again.load_state_dict(ledger.state_dict())
    assert again.state_dict() == ledger.state_dict()
    assert check_ledger(again, made.plan, made.groups) == []


@pytest.mark.parametrize("disturb", ["lost", "twice", "another", "step"])
def test_a_sample_lost_or_met_twice_is_found(made, disturb):
    ledger = Ledger()
    for number, batch in enumerate(made.stream(0, 8)):
        ids = {key: list(members) for key, members in batch.ids.items()}
        members = next(iter(ids.values()))
        if number == 3:
            if disturb == "lost":
                members.pop()
            elif disturb == "twice":
                members.append(members[0])
            elif disturb == "another":
                members[0] = bytes(16)
        if number != 3 or disturb != "step":
            ledger.add(ids)
    ledger.join(Ranks())
    assert check_ledger(ledger, made.plan, made.groups)


def test_steps_that_do_not_add_up_to_the_epochs_are_found(made):
    ledger = filled(made, 5)
    ledger.steps[1] += tally(IDS[:1])
    assert "its steps do not add up to its epochs" in check_ledger(ledger, made.plan, made.groups)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("damaged", [lambda epoch: True, lambda epoch: epoch == 0, lambda epoch: epoch == 1])
def test_samples_in_quarantine_are_told_apart_from_lost_ones(made, damaged, told):
    ledger = Ledger()
    bad = int(made.plan.rows["image"].groups[0])
    for number, batch in enumerate(made.stream(0, 8)):
        samples, missing, ids = made.plan.batch(number), {}, {key: list(members) for key, members in batch.ids.items()}
        for kind, group, row, epoch in zip(samples.kinds, samples.groups, samples.rows, samples.epochs, strict=True):
            if group == bad and damaged(epoch):
                missing.setdefault((made.plan.kinds[kind], int(epoch)), []).append((bad, int(row)))
                ids[made.plan.kinds[kind], int(epoch)].remove(made.groups.get(bad).sample_ids[row])
        ledger.add(ids, missing if told else {})
    ledger.join(Ranks())
    again = Ledger()
    again.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert (check_ledger(again, made.plan, made.groups) == []) == told
    assert (again.num_missing > 0) == told
