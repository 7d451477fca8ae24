"""Training on stored text states is training with the encoder, and what an edit's encoder saw lies where the pictures do."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model_core.data.buckets import fit
from model_core.data.conditions import Condition, condition_of
from model_core.data.folders import LocalFolder
from model_core.data.index import read_index
from model_core.data.latents import TRAIN, LatentGroup, latent_group, latent_rows
from model_core.data.loader import Batch, Draws, Loader, MicroBatch, draw_prompt, tokens
from model_core.data.pixels import image_tensor
from model_core.data.plan import make_plan
from model_core.data.row_groups import RowGroups
from model_core.data.shards import decode_image, read_rows
from model_core.data.states import read_empty
from model_core.models.condition import ConditionEncoder, load_encoder
from model_core.models.mmdit import MMDiT
from model_core.models.segments import interleave, text_runs
from model_core.models.stream import pack
from model_core.models.vae import load_vae
from model_core.recipe import MMDiTModel
from model_core.training.parallel import Layout
from model_core.training.passes import Passes, text_states
from model_core.training.validation import validation_loss
from tests.encoded_inputs import Input, write_inputs, write_stage

MODEL = MMDiTModel(num_layers=2, num_heads=2, head_dim=16, rope_axes=(4, 6, 6))
WEIGHTS = {"general": 0.4, "text": 0.2, "knowledge": 0.2, "structured": 0.2}
KINDS = ("image", "edit")
BATCHES = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Input]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def encode(inputs: dict[str, Input], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @functools.cache
    def made(*, sees_images: bool, cache_states: bool) -> Path:
        return write_stage(inputs, tmp_path_factory.mktemp("latents"), sees_images=sees_images, cache_states=cache_states)

    return made


@pytest.fixture(scope="module")
def model() -> MMDiT:
    torch.manual_seed(0)
    made = MMDiT(MODEL, latent_channels=4, text_dim=32)
    torch.nn.init.normal_(made.image_out.weight, std=0.3)
    return made


def open_groups(root: Path) -> RowGroups[LatentGroup]:
    return RowGroups(LocalFolder(root), read_index(LocalFolder(root)), latent_group, capacity=99, say=print)


def batches(root: Path, empty: Condition, *, kinds: tuple[str, ...] = KINDS, dropout: float = 0.3) -> list[Batch]:
    """The first batches of a stage; their order does not depend on how it stores its text."""
    groups = open_groups(root)
    plan = make_plan(
        digest="the same",
        seed=3,
        stage="S1",
        rows=latent_rows(groups.index, kinds=kinds),
        shares={kind: 1 / len(kinds) for kind in kinds},
        batch_size=4,
        window=2,
    )
    loader = Loader(groups, plan, Draws((0.0, 1.0), dropout, WEIGHTS, empty=empty), MODEL)
    return [loader.batch(number) for number in range(BATCHES)]


def empty_of(root: Path) -> Condition:
    stored = read_empty(LocalFolder(root))
    return Condition("", stored.runs, stored.states)


def micros(made: list[Batch]) -> list[MicroBatch]:
    return [micro for batch in made for micro in batch.micro_batches]


def losses(model: MMDiT, encoder: ConditionEncoder | None, made: list[Batch]) -> list[float]:
    passes = Passes(encoder, Layout())
    return [passes.backward(model, batch).loss.item() for batch in made]


@pytest.mark.parametrize("sees_images", [False, True])
def test_losses_with_stored_states_are_those_with_the_encoder(inputs, encode, model, sees_images):
    """Where the encoder sees images, edits are stored in both runs, so the other one mixes stored and computed states in a pass."""
    one = load_encoder(inputs[f"encoder-{sees_images}"].folder("encoder"))
    online, cached = (encode(sees_images=sees_images, cache_states=cache) for cache in (False, True))
    computed = batches(online, empty_of(online) if sees_images else Condition("", (one.num_tokens(""),)))
    stored = batches(cached, empty_of(cached))
    assert {states is None for micro in micros(computed) for states in micro.states} == ({True, False} if sees_images else {True})
    assert all(states is not None and states.dtype == torch.bfloat16 for micro in micros(stored) for states in micro.states)
    for mine, theirs in zip(micros(stored), micros(computed), strict=True):
        assert (mine.samples, mine.prompts) == (theirs.samples, theirs.prompts)
        assert torch.equal(mine.stream.order, theirs.stream.order)
        assert torch.equal(mine.stream.positions, theirs.stream.positions)
    assert "" in {prompt for micro in micros(stored) for prompt in micro.prompts}
    found, wanted = losses(model, None, stored), losses(model, one, computed)
    assert found == pytest.approx(wanted, rel=1e-3)
    for micro in micros(stored):
        micro.states[:] = [torch.zeros_like(states) for states in micro.states if states is not None]
    assert min(abs(other - loss) / loss for other, loss in zip(losses(model, None, stored), wanted, strict=True)) > 2e-3


@pytest.mark.parametrize("sees_images", [False, True])
def test_validation_losses_with_stored_states_are_those_with_the_encoder(inputs, encode, model, monkeypatch, sees_images):
    monkeypatch.setattr("model_core.training.validation.TIMES", (0.25, 0.75))
    one = load_encoder(inputs[f"encoder-{sees_images}"].folder("encoder"))
    told = []
    for cache_states, encoder in ((False, one), (True, None)):
        groups = open_groups(encode(sees_images=sees_images, cache_states=cache_states))
        rows = latent_rows(groups.index, kinds=KINDS, split=TRAIN)
        told.append(validation_loss(model, encoder, groups, rows, seed=0, empty=Condition("", (one.num_tokens(""),))))
    assert set(told[0]) == set(KINDS)
    assert told[1] == pytest.approx(told[0], rel=1e-3)


def test_a_row_without_words_is_one_that_lost_its_prompt(encode):
    root = encode(sees_images=True, cache_states=True)
    empty, groups = empty_of(root), open_groups(root)
    for number in range(len(groups.index)):
        group = groups.get(number)
        assert group is not None
        name = "instruction" if group.bucket.kind == "edit" else "general"
        wordless = dataclasses.replace(group, prompts={name: [""] * len(group) for name in group.prompts})
        drawn = draw_prompt(wordless, 0, Draws((0.0, 1.0), 0.0, WEIGHTS), np.random.default_rng(0))
        assert drawn is None
        assert draw_prompt(group, 0, Draws((0.0, 1.0), 0.0, {"general": 1.0}), np.random.default_rng(0)) == name
        found = condition_of(wordless, 0, drawn, empty=empty)
        assert found.prompt == ""
        wanted = group.states["empty"].row(0).states if group.bucket.kind == "edit" else empty.states
        assert found.states is not None
        assert torch.equal(found.states, wanted)


def references_of(inputs: dict[str, Input], prompt: str, grid: tuple[int, int]) -> list[Tensor]:
    """An edit's references at the size of its bucket."""
    (edit,) = [row for row in read_rows(inputs["edits"]) if row.instruction == prompt]
    return [image_tensor(fit(decode_image(image), (16 * grid[0], 16 * grid[1]))) for image in edit.references]


def test_what_the_encoder_saw_lies_where_its_slots_were(inputs, encode):
    root = encode(sees_images=True, cache_states=False)
    one, vae = load_encoder(inputs["encoder-True"].folder("encoder")), load_vae(inputs["vae"].folder("vae"))
    counts = set()
    for micro in micros(batches(root, empty_of(root), kinds=("edit",), dropout=0.0)):
        text = text_states(None, micro.prompts, micro.states, like=torch.zeros(1))
        first_text, first_picture, order = 0, len(text), []
        for prompt, sample in zip(micro.prompts, micro.samples, strict=True):
            references = references_of(inputs, prompt, sample[-1])
            packed = one.encode_packed([prompt], [references])
            own = text[first_text : first_text + len(packed.states)]
            assert torch.allclose(own, packed.states, rtol=2**-7, atol=1e-4)
            before, *rest = [segment for segment in packed.segments[0] if isinstance(segment, int)]
            counts.add(len(references))
            assert len(rest) == len(references)
            size = sample[-1][0] * sample[-1][1]
            order += range(first_text, first_text + before)
            first_text += before
            for reference, run in zip(references, rest, strict=True):
                with torch.inference_mode():
                    latent = vae.standardise(vae.encode(reference[None]))
                place = first_picture - len(text)
                assert torch.allclose(micro.pictures[place : place + size], tokens(latent)[0], rtol=2**-7, atol=1e-2)
                order += [*range(first_picture, first_picture + size), *range(first_text, first_text + run)]
                first_picture, first_text = first_picture + size, first_text + run
            order += range(first_picture, first_picture + size)
            first_picture += size
        assert micro.stream.order.tolist() == order
    assert counts == {1, 2}


def test_the_velocity_follows_what_the_encoder_was_shown(inputs, model):
    one = load_encoder(inputs["encoder-True"].folder("encoder"))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(32, 4, generator=generator)

    @torch.inference_mode()
    def velocity(shade: float) -> Tensor:
        packed = one.encode_packed(["make it blue"], [[torch.full((3, 64, 64), shade)]])
        sample = (*packed.segments[0], (4, 4))
        assert [isinstance(segment, int) for segment in sample] == [True, False, True, False]
        return model(latents, packed.states, torch.tensor([0.5]), pack([sample], MODEL))

    assert torch.equal(velocity(0.9), velocity(0.9))
    assert (velocity(0.9) - velocity(-0.9)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("sees_images", "cache_states", "stored"), [(False, False, "none"), (False, True, "shared"), (True, False, "own"), (True, True, "own")]
)
def test_an_edit_that_loses_its_prompt_keeps_its_references_where_they_were_seen(inputs, encode, sees_images, cache_states, stored):
    root = encode(sees_images=sees_images, cache_states=cache_states)
    one = load_encoder(inputs[f"encoder-{sees_images}"].folder("encoder"))
    empty = Condition("", (one.num_tokens(""),)) if stored == "none" else empty_of(root)
    seen = []
    for micro in micros(batches(root, empty, kinds=("edit",), dropout=1.0)):
        assert set(micro.prompts) == {""}
        for states, sample in zip(micro.states, micro.samples, strict=True):
            pictures = [segment for segment in sample if not isinstance(segment, int)]
            num_images = len(pictures) - 1 if sees_images else 0
            runs = text_runs(sample)
            assert sum(runs) == one.num_tokens("", num_images=num_images)
            assert len(runs) == 1 + num_images
            assert (states is None) == (stored == "none")
            seen += [] if states is None else [tuple(states.flatten().tolist())]
    assert (len(set(seen)) == 1) == (stored == "shared")


def test_runs_of_text_lie_before_the_pictures_of_their_number():
    assert interleave([3, 0, 2], [(1, 2), (3, 4), (5, 6)]) == (3, (1, 2), 0, (3, 4), 2, (5, 6))
    assert interleave([7], [(1, 2), (3, 4), (5, 6)]) == (7, (1, 2), (3, 4), (5, 6))
    assert len(pack([interleave([3, 0, 2], [(1, 2), (3, 4), (5, 6)])], MODEL)) == 5 + 2 + 12 + 30


def test_states_that_are_neither_stored_nor_to_be_computed_are_missed(inputs):
    with pytest.raises(ValueError, match="found no text states of 1 prompts, and there is no condition encoder"):
        text_states(None, ["a", "b"], [torch.zeros(2, 32), None], like=torch.zeros(1))


def test_computed_and_stored_states_keep_the_order_of_the_samples(inputs):
    one = load_encoder(inputs["encoder-False"].folder("encoder"))
    stored = [torch.full((2, 32), 1.0).bfloat16(), None, torch.full((3, 32), 2.0).bfloat16(), None]
    found = text_states(one, ["p", "a circle", "q", "red"], stored, like=torch.zeros(1))
    first, second = one.encode_packed(["a circle", "red"]).split()
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.cat([stored[0].float(), first, stored[2].float(), second]))
