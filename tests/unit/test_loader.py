"""Batches: keyed draws and the very same samples on any number of ranks and workers, resumed anywhere."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_core.data.folders import LocalFolder
from model_core.data.latents import floats, latent_group, latent_rows
from model_core.data.loader import Batch, Draws, Loader, MicroBatch, first_fit, tokens
from model_core.data.plan import make_plan
from model_core.data.row_groups import RowGroups
from model_core.models.segments import num_tokens
from model_core.training.distributed import Ranks
from model_core.training.ledger import Ledger, check_ledger
from tests.latent_sets import MODEL, sample_id, write_latents

DRAWS = Draws((0.0, 1.0), 0.1, {"general": 0.5, "text": 0.5, "knowledge": 0.0, "structured": 0.0})
SIZES = {"image": 23, "edit": 11}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    return LocalFolder(root), write_latents(root, SIZES, shapes=((2, 3), (3, 2)), held_out=3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    return LocalFolder(root), write_latents(root, {"image": 40}, rows_a_group=16)


def loader(made, *, batch_size=6, draws=DRAWS, ranks=Ranks(), workers=0, budget=None, kinds=("image", "edit"), seed=3) -> Loader:  # noqa: B008
    folder, index = made
    groups = RowGroups(folder, index, latent_group, capacity=16, say=lambda line: pytest.fail(line))
    plan = make_plan(
        digest=index.digest,
        seed=seed,
        stage="S2",
        rows=latent_rows(index, kinds=kinds),
        shares={kind: 1 / len(kinds) for kind in kinds},
        batch_size=batch_size,
        window=2,
    )
    return Loader(groups, plan, draws, MODEL, budget, ranks, workers)


def noise_and_pictures(micro: MicroBatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The target noise and all picture tokens of each sample of a pass."""
    pictures = [sum(num_tokens(segment) for segment in sample[1:]) for sample in micro.samples]
    noise = [num_tokens(sample[-1]) for sample in micro.samples]
    return list(zip(micro.noise.split(noise), micro.pictures.split(pictures), strict=True))


def drawn(batch: Batch) -> list[tuple[float, str, float, float]]:
    """What each sample of a batch meets: time, prompt, noise, latents."""
    return [
        (t.item(), prompt, noise.double().sum().item(), pictures.double().sum().item())
        for micro in batch.micro_batches
        for t, prompt, (noise, pictures) in zip(micro.t, micro.prompts, noise_and_pictures(micro), strict=True)
    ]


def ids_of(batch: Batch) -> Counter:
    return Counter((*key, sample) for key, members in batch.ids.items() for sample in members)


def test_tokens_are_the_places_of_a_latent_row_by_row():
    latents = torch.arange(2 * 4 * 2 * 3, dtype=torch.float32).reshape(2, 4, 2, 3)
    assert torch.equal(tokens(latents)[1, 4], latents[1, :, 1, 1])


def test_a_batch_holds_its_samples_in_one_stream_and_never_a_held_out_one(small):
    allowed = {sample_id(kind, number) for kind, size in SIZES.items() for number in range(size - 3)}
    shapes = set()
    for number in range(12):
        batch = loader(small).batch(number)
        (micro,) = batch.micro_batches
        assert len(micro) == 6
        assert {sample for members in batch.ids.values() for sample in members} <= allowed
        assert len(micro.stream) == batch.num_tokens == sum(num_tokens(segment) for sample in micro.samples for segment in sample)
        assert micro.is_target.sum() == len(micro.noise) == batch.num_elements / 4
        assert all(
            (len(sample) == 3) == prompt.startswith("change") for sample, prompt in zip(micro.samples, micro.prompts, strict=True) if prompt
        )
        shapes |= {sample[-1] for sample in micro.samples}
    assert shapes == {(2, 3), (3, 2)}


def test_pictures_lie_in_the_stream_references_first(small):
    it = loader(small, kinds=("edit",))
    latents = {}
    for number in range(len(small[1])):
        group = it.groups.get(number)
        stacked = np.concatenate((group.references, group.latents[:, None]), axis=1)
        latents |= dict(zip(group.sample_ids, stacked, strict=True))
    for number in range(12):
        batch = it.batch(number)
        (micro,) = batch.micro_batches
        ids = [identity for members in batch.ids.values() for identity in members]
        # Samples of one epoch keep their order; where a batch spans two, their sets are compared.
        expected = [tokens(floats(latents[identity])).flatten(0, 1).double().sum().item() for identity in ids]
        assert sorted(pictures.double().sum().item() for _, pictures in noise_and_pictures(micro)) == pytest.approx(sorted(expected))
        for _, pictures in noise_and_pictures(micro):
            assert any(torch.equal(pictures, tokens(floats(latents[identity])).flatten(0, 1)) for identity in ids)


def test_draws_do_not_depend_on_the_batch_size_or_on_what_came_before(small):
    def draws(batch_size: int, numbers) -> list:
        return sorted(sample for number in numbers for sample in drawn(loader(small, batch_size=batch_size).batch(number)))

    assert draws(4, range(6)) == draws(12, range(2))
    assert draws(4, [5]) == draws(4, [5])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(1, 13),
    st.integers(0, 3),
)
def test_attempts_that_die_and_resume_on_other_ranks_use_the_undisturbed_runs_samples(small, attempts, batch_size, lost):
    """Each attempt: (ranks, workers, batches until it dies); the last `lost` batches before a death were not checkpointed."""
    whole = loader(small, batch_size=batch_size)
    ledger, done = Ledger(), 0
    for size, workers, length in attempts:
        state = ledger.state_dict()
        streams = [loader(small, batch_size=batch_size, ranks=Ranks(rank, size), workers=workers) for rank in range(size)]
        kept = max(0, length - lost)
        for number, batches in enumerate(zip(*(stream.stream(done, done + length) for stream in streams), strict=True), done):
            undisturbed = whole.batch(number)
            assert sum((ids_of(batch) for batch in batches), Counter()) == ids_of(undisturbed)
            assert sorted(sample for batch in batches for sample in drawn(batch)) == sorted(drawn(undisturbed))
            if number < done + kept:
                joined: dict = {}
                for batch in batches:
                    for key, members in batch.ids.items():
                        joined.setdefault(key, []).extend(members)
                ledger.add(joined)
        ledger.join(Ranks())
        done += kept
        state = ledger.state_dict()
        ledger = Ledger()
        ledger.load_state_dict(state)
    assert len(ledger.steps) == done
    assert check_ledger(ledger, whole.plan, whole.groups) == []


def test_prompts_are_dropped_captioned_and_instructed_in_their_shares(tmp_path):
    made = LocalFolder(tmp_path), write_latents(tmp_path, {"image": 40, "edit": 40})
    it = loader(made, batch_size=20)
    prompts = [prompt for number in range(100) for micro in it.batch(number).micro_batches for prompt in micro.prompts]
    share = {word: sum(prompt.startswith(word) for prompt in prompts) / len(prompts) for word in ("general", "text", "knowledge", "change")}
    assert share["knowledge"] == 0
    assert share["change"] == pytest.approx(0.45, abs=0.03)
    assert share["general"] == pytest.approx(0.225, abs=0.03)
    assert sum(prompt == "" for prompt in prompts) / len(prompts) == pytest.approx(0.1, abs=0.03)


def test_prompts_do_not_depend_on_the_order_in_which_the_recipe_lists_its_caption_types(pictures):
    backwards = dataclasses.replace(DRAWS, caption_weights=dict(reversed(DRAWS.caption_weights.items())))
    prompts = [
        [micro.prompts for number in range(20) for micro in loader(pictures, draws=it, kinds=("image",)).batch(number).micro_batches]
        for it in (DRAWS, backwards)
    ]
    assert prompts[0] == prompts[1]


def test_times_follow_the_logit_normal_distribution(pictures):
    it = loader(pictures, batch_size=20, kinds=("image",))
    times = torch.cat([micro.t for number in range(100) for micro in it.batch(number).micro_batches])
    assert times.quantile(0.5).item() == pytest.approx(0.5, abs=0.03)
    assert times.quantile(0.25).item() == pytest.approx(0.3375, abs=0.03)


def test_micro_batches_keep_the_token_budget(pictures):
    it = loader(pictures, batch_size=32, kinds=("image",), budget=60)
    for number in range(10):
        batch = it.batch(number)
        assert sum(len(micro) for micro in batch.micro_batches) == 32
        assert all(len(micro.stream) <= 60 for micro in batch.micro_batches)
    assert len(loader(pictures, batch_size=32, kinds=("image",)).batch(0).micro_batches) == 1


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_first_fit_packs_each_once_within_the_budget_and_leaves_no_two_packs_that_would_fit_in_one(lengths, budget):
    packs = first_fit(lengths, budget=budget)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in pack) for pack in packs]
    assert all(total <= budget or len(pack) == 1 for total, pack in zip(sums, packs, strict=True))
    assert sum(sorted(sums)[:2]) > budget or len(packs) < 2


def test_a_row_group_is_read_once_an_epoch(pictures):
    it = loader(pictures, batch_size=8, kinds=("image",), workers=2)
    for _ in it.stream(0, 5):
        pass
    assert it.groups.num_reads == len(pictures[1]) == 3


def test_time_spent_waiting_is_told(small, monkeypatch):
    it = loader(small, workers=1)
    monkeypatch.setattr(Loader, "batch", lambda self, number: [number, __import__("time").sleep(0.05)][0])
    assert list(it.stream(0, 3)) == [0, 1, 2]
    assert it.waited_seconds > 0.04


def test_an_error_in_a_worker_reaches_the_training_loop(small, monkeypatch):
    def broken(self: Loader, number: int) -> Batch:
        if number == 2:
            raise RuntimeError("worker of batch 2")
        return Batch([], {}, {})

    monkeypatch.setattr(Loader, "batch", broken)
    with pytest.raises(RuntimeError, match="batch 2"):
        list(loader(small, workers=2).stream(0, 5))


def test_noise_is_standard_normal(pictures):
    noise = torch.cat(
        [micro.noise.flatten() for number in range(60) for micro in loader(pictures, kinds=("image",)).batch(number).micro_batches]
    )
    assert np.abs([noise.mean().item(), noise.std().item() - 1]).max() < 0.03


def test_rows_of_a_damaged_row_group_are_left_out_and_named(tmp_path):
    index = write_latents(tmp_path, {"image": 40})
    path = tmp_path / index[0].path
    data = bytearray(path.read_bytes())
    data[index[4].offset + 30] ^= 1
    path.write_bytes(data)
    said: list[str] = []
    whole = loader((LocalFolder(tmp_path), index), batch_size=8, kinds=("image",), workers=2)
    it = dataclasses.replace(whole, groups=RowGroups(LocalFolder(tmp_path), index, latent_group, capacity=16, say=said.append))
    ledger = Ledger()
    for number, batch in enumerate(it.stream(0, 5)):
        planned = it.plan.batch(number)
        places = [(4, row) for row in sorted(planned.rows[planned.groups == 4].tolist())]
        assert sorted(place for places in batch.missing.values() for place in places) == places
        assert sum(map(len, batch.micro_batches)) == 8 - len(places)
        ledger.add(batch.ids, batch.missing)
    ledger.join(Ranks())
    assert ledger.num_missing == 4
    assert check_ledger(ledger, it.plan, it.groups) == []
    assert len(said) == 1
