"""The same training on 1 to 4 processes, however it is laid out: whole weights, FSDP2, HSDP, context parallelism."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model_core.data.conditions import Condition
from model_core.data.folders import LocalFolder
from model_core.data.index import read_index
from model_core.data.latents import latent_group, latent_rows
from model_core.data.loader import Draws, Loader
from model_core.data.plan import make_plan
from model_core.data.row_groups import RowGroups
from model_core.models.condition import TextStates
from model_core.models.mmdit import MMDiT
from model_core.recipe import MMDiTModel
from model_core.site import LaunchProfile
from model_core.storage import open_storage
from model_core.training.checkpoint import CheckpointStore
from model_core.training.distributed import ALONE, Ranks, whole
from model_core.training.ema import ema_of, update_ema
from model_core.training.optim import Optimizer
from model_core.training.parallel import lay_out, prepare, shard
from model_core.training.passes import Passes
from tests.latent_sets import CHANNELS, write_latents
from tests.ranks import on_ranks

STEPS, TEXT_DIM = 30, 8
MODEL = MMDiTModel(num_layers=2, num_heads=6, head_dim=8, rope_axes=(2, 4, 2))


class Letters:
    """A stand-in for the encoder with as many states as the latents' token counts say, told by the prompt's letters."""

    def encode_packed(self, prompts: list[str]) -> TextStates:
        lengths = [num_states(prompt) for prompt in prompts]
        seeds = [sum(map(ord, prompt)) for prompt in prompts]
        states = [
            torch.randn(length, TEXT_DIM, generator=torch.Generator().manual_seed(seed))
            for length, seed in zip(lengths, seeds, strict=True)
        ]
        return TextStates(torch.cat(states), [[length] for length in lengths])


def num_states(prompt: str) -> int:
    """Those that tests/latent_sets.py writes down for a prompt."""
    return 1 + int(prompt.split()[-1]) % 7 if prompt else 2


def train(ranks: Ranks, root: Path, fields: dict[str, Any], budget: int | None, uri: str | None = None) -> tuple[list[float], float]:
    """Losses of a short training of images and edits of two shapes, and the sum of the averaged weights at its end."""
    profile = LaunchProfile.model_validate(fields | {"processes": ranks.size})
    if profile.shard == "hsdp":  # as on machines of two processes each
        ranks = replace(ranks, local_rank=ranks.rank % 2, local_size=2)
    folder, index = LocalFolder(root), read_index(LocalFolder(root))
    groups = RowGroups(folder, index, latent_group, capacity=16, say=print)
    rows = latent_rows(index, kinds=("image", "edit"))
    plan = make_plan(digest=index.digest, seed=3, stage="S2", rows=rows, shares={"image": 0.5, "edit": 0.5}, batch_size=6, window=2)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    model = MMDiT(MODEL, latent_channels=CHANNELS, text_dim=TEXT_DIM)
    layout = lay_out(ranks, context_parallel=profile.context_parallel)
    draws = Draws((0.0, 1.0), 0.1, {"general": 1.0}, empty=Condition("", (num_states(""),)))
    loader = Loader(groups, plan, draws, MODEL, budget, layout.data)
    ema = ema_of(model)
    prepare(model, profile, ranks)
    shard(ema, profile, ranks)
    optimizer = Optimizer(model, lr=2e-3, warmup_steps=5, betas=(0.9, 0.95), weight_decay=0.01, grad_clip=1.0)
    passes = Passes(Letters(), layout)  # type: ignore[arg-type]
    first, parts = 0, {"model": model, "ema": ema, "optimizer": optimizer}
    store = None if uri is None else CheckpointStore(open_storage(uri), "x", say=print, scratch=root / "scratch", ranks=ranks)
    if store is not None and (found := store.restore(parts)) is not None:
        first = found.step
    losses = []
    for step in range(first, STEPS):
        losses.append(passes.backward(model, loader.batch(step)).loss.item())
        optimizer.clip()
        optimizer.step(step)
        update_ema(ema, model, step=step, decay=0.9)
        if store is not None and step + 1 == STEPS // 2 and first == 0:
            store.save(step + 1, parts, notes={})
            store.wait()
            break
    return losses, sum(whole(value).double().abs().sum().item() for value in ema.state_dict().values())


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("latents")
    write_latents(root, {"image": 23, "edit": 11}, shapes=((2, 3), (3, 2)))
    return root


@pytest.fixture(scope="module")
def alone(latents: Path) -> tuple[list[float], float]:
    losses, weights = train(ALONE, latents, {}, None)
    assert sum(losses[-10:]) < 0.97 * sum(losses[:10])
    return losses, weights


LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [{}, {"shard": "fsdp"}, {"context_parallel": 2}],
    3: [{}, {"shard": "fsdp"}, {"context_parallel": 3}],
    4: [
        {},
        {"shard": "fsdp"},
        {"shard": "hsdp"},
        {"context_parallel": 2},
        {"context_parallel": 2, "shard": "fsdp", "activation_checkpointing": "full"},
    ],
}


def train_in_turn(ranks: Ranks, root: Path, layouts: list[dict[str, Any]]) -> list[tuple[list[float], float]]:
    return [train(ranks, root, fields, None) for fields in layouts]


@pytest.mark.parametrize("size", LAYOUTS)
def test_losses_do_not_depend_on_the_ranks(latents: Path, alone: tuple[list[float], float], size: int) -> None:
    for results in on_ranks(size, train_in_turn, latents, LAYOUTS[size]):
        for fields, (losses, weights) in zip(LAYOUTS[size], results, strict=True):
            assert losses == pytest.approx(alone[0], abs=1e-5), fields
            assert weights == pytest.approx(alone[1], rel=1e-5), fields


@pytest.mark.parametrize(
    ("fields", "budget"),
    [({}, 25), ({}, 60), ({"activation_checkpointing": "selective"}, None), ({"activation_checkpointing": "full"}, None)],
    ids=str,
)
def test_losses_do_not_depend_on_packing_accumulation_and_recomputation(
    latents: Path, alone: tuple[list[float], float], fields: dict[str, Any], budget: int | None
) -> None:
    losses, weights = train(ALONE, latents, fields, budget)
    assert losses == pytest.approx(alone[0], abs=1e-5)
    assert weights == pytest.approx(alone[1], rel=1e-5)


@pytest.mark.parametrize(
    ("before", "after"), [((3, {"shard": "fsdp"}), (2, {})), ((2, {}), (4, {"shard": "fsdp", "context_parallel": 2}))], ids=str
)
def test_a_checkpoint_goes_on_in_another_layout(
    latents: Path, alone: tuple[list[float], float], tmp_path: Path, before: tuple[int, dict[str, Any]], after: tuple[int, dict[str, Any]]
) -> None:
    uri = (tmp_path / "store").as_uri()
    halves = [on_ranks(size, train, latents, fields, None, uri)[0] for size, fields in (before, after)]
    assert halves[0][0] + halves[1][0] == pytest.approx(alone[0], abs=1e-5)
    assert halves[1][1] == pytest.approx(alone[1], rel=1e-5)


def test_compiled_blocks_give_the_same_losses_with_few_graphs(latents: Path, alone: tuple[list[float], float]) -> None:
    torch._dynamo.reset()
    losses, weights = train(ALONE, latents, {"compile": True}, 60)  # passes of many lengths
    assert losses == pytest.approx(alone[0], abs=1e-5)
    assert weights == pytest.approx(alone[1], rel=1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= 4  # before attention and after it, and a second time once lengths are known to vary
    assert not counters["graph_break"]
