"""Checkpoints of several processes that talk through gloo: any world size reads them, and a failing rank hangs nobody."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from model_core.storage import S3Settings, Storage, StorageError, open_storage
from model_core.training.checkpoint import CheckpointStore, Restored
from model_core.training.distributed import Ranks
from model_core.training.optim import Optimizer
from model_core.training.stopping import Stopped, noting_sigterm
from tests.checkpoint_parts import RemoteStorage, value_of, weights
from tests.ranks import on_ranks

PREFIX = "train_mmdit/0/checkpoints"


def store_on(storage: Storage, folder: Path, ranks: Ranks, said: list[str]) -> CheckpointStore:
    return CheckpointStore(storage, PREFIX, say=said.append, scratch=folder / "scratch", ranks=ranks)


def opened(uri: str) -> Storage:
    return open_storage(uri, S3Settings(endpoint_url=os.environ.get("LAB_S3_ENDPOINT")))


def save_two(ranks: Ranks, uri: str, folder: Path) -> None:
    store = store_on(opened(uri), folder, ranks, [])
    for step in (100, 200):
        store.save(step, weights(float(step), rows=500), notes={"seen": step})
    store.wait()


def restore(ranks: Ranks, uri: str, folder: Path, *, remote: bool = False) -> tuple[Restored | None, float, list[str], list[str]]:
    """What was found, what the state says, what was said, and which files this rank has fetched."""
    said: list[str] = []
    storage = RemoteStorage(opened(uri)) if remote else opened(uri)
    parts = weights(-1.0, rows=500)
    found = store_on(storage, folder, ranks, said).restore(parts)
    fetched = [path for method, path in getattr(storage, "calls", []) if method == "download"]
    return found, value_of(parts), said, fetched


def flip_a_byte(storage: Storage, step: int) -> None:
    path = next(entry.path for entry in storage.list(f"{PREFIX}/step-{step:08d}/") if entry.path.endswith("__1_0.distcp"))
    data = bytearray(storage.get(path))
    data[len(data) // 2] ^= 1
    storage.put(path, bytes(data))


@pytest.fixture(scope="module")
def of_three(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with the checkpoints of steps 100 and 200 of three ranks."""
    folder = tmp_path_factory.mktemp("three")
    uri = (folder / "store").as_uri()
    on_ranks(3, save_two, uri, folder)
    return uri


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_checkpoint_of_three_ranks_loads_at_another_world_size(of_three: str, tmp_path: Path, size: int) -> None:
    written = {entry.path.rpartition("/")[2] for entry in open_storage(of_three).list(f"{PREFIX}/step-00000200/")}
    assert {"__0_0.distcp", "__1_0.distcp"} <= written  # the ranks have shared the state out
    answers = on_ranks(size, restore, of_three, tmp_path)
    assert [(found, value) for found, value, _, _ in answers] == [(Restored(200, {"seen": 200}), 200.0)] * size
    assert [said for _, _, said, _ in answers] == [["resumed after step 200"]] + [[]] * (size - 1)


def restore_remotely(ranks: Ranks, uri: str, folder: Path) -> Any:
    return restore(ranks, uri, folder, remote=True)


def test_the_ranks_of_a_machine_fetch_each_file_once_and_pass_over_damage_alike(tmp_path: Path) -> None:
    uri = (tmp_path / "store").as_uri()
    on_ranks(2, save_two, uri, tmp_path)
    flip_a_byte(open_storage(uri), 200)
    answers = on_ranks(2, restore_remotely, uri, tmp_path)
    assert [(found, value) for found, value, _, _ in answers] == [(Restored(100, {"seen": 100}), 100.0)] * 2
    assert "step-00000200/" in answers[0][2][0]
    assert answers[0][2][0].endswith("the checkpoint of step 100 is used instead")
    fetched = [path for _, _, _, paths in answers for path in paths if "step-00000100" in path]
    assert len(fetched) == len(set(fetched)) == 4
    assert min(len(paths) for _, _, _, paths in answers) > 0


def save_with_a_failing_rank(ranks: Ranks, uri: str, folder: Path) -> tuple[list[str], str, int | None]:
    said: list[str] = []
    storage = RemoteStorage(opened(uri))
    storage.fails = lambda method, path: ranks.rank == 1 and method == "upload" and "step-00000200" in path
    store = store_on(storage, folder, ranks, said)
    parts = weights(1.0, rows=500)
    for step in (100, 200):
        store.save(step, parts, notes={})
    try:
        store.wait()
        failure = ""
    except StorageError as error:
        failure = str(error)
    store.save(300, parts, notes={})
    store.wait()
    found = store.restore(parts)
    return said, failure, found and found.step


def test_one_ranks_failed_upload_is_told_on_all_and_the_next_save_succeeds(tmp_path: Path) -> None:
    answers = on_ranks(3, save_with_a_failing_rank, (tmp_path / "store").as_uri(), tmp_path)
    for said, failure, step in answers:
        assert said[0].startswith("checkpoint of step 200 failed: rank 1: file://")
        assert "no route to host" in failure
        assert step == 300
    assert not list((tmp_path / "store" / PREFIX / "step-00000200").rglob("*.distcp"))


def train_until_told_to_stop(ranks: Ranks, uri: str, folder: Path) -> tuple[int, bool]:
    """(steps done, whether Stopped was raised) of a loop in which the last rank alone gets SIGTERM, during its third step."""
    store, done = store_on(opened(uri), folder, ranks, []), 0
    try:
        with noting_sigterm() as stopping:
            for step in range(10):
                if step == 2 and ranks.rank == ranks.size - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                done = step + 1
                if stopping.agreed(ranks):
                    store.save(done, weights(float(done)), notes={})
                    store.wait()
                    raise Stopped
    except Stopped:
        return done, True
    return done, False


def test_sigterm_to_one_rank_saves_and_stops_all_after_the_same_step(tmp_path: Path) -> None:
    uri = (tmp_path / "store").as_uri()
    assert on_ranks(2, train_until_told_to_stop, uri, tmp_path) == [(3, True)] * 2
    parts = weights(-1.0)
    found = store_on(open_storage(uri), tmp_path, Ranks(), []).restore(parts)
    assert found == Restored(3, {})
    assert value_of(parts) == 3.0


def sharded(ranks: Ranks) -> tuple[nn.Module, Optimizer]:
    """A model whose parameters are split over the ranks, and its optimizer after two steps on gradients that follow from them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    if ranks.size > 1:
        fully_shard(model)
    optimizer = Optimizer(model, lr=0.1, warmup_steps=0, betas=(0.9, 0.99), weight_decay=0.1, grad_clip=1.0)
    return model, optimizer


def take_steps(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        model(torch.linspace(-1, 1, 24).reshape(4, 6) + step).square().mean().backward()
        optimizer.clip()
        optimizer.step(step)


def save_sharded(ranks: Ranks, uri: str, folder: Path) -> None:
    model, optimizer = sharded(ranks)
    take_steps(model, optimizer, range(2))
    store = store_on(opened(uri), folder, ranks, [])
    store.save(2, {"model": model, "optimizer": optimizer}, notes={})
    store.wait()


def resume_sharded(ranks: Ranks, uri: str, folder: Path) -> dict[str, Any]:
    model, optimizer = sharded(ranks)
    store_on(opened(uri), folder, ranks, []).restore({"model": model, "optimizer": optimizer})
    take_steps(model, optimizer, range(2, 4))
    return {name: (value.full_tensor() if ranks.size > 1 else value).detach().tolist() for name, value in model.named_parameters()}


def test_parameters_and_moments_split_over_ranks_go_on_at_another_world_size(tmp_path: Path) -> None:
    uri = (tmp_path / "store").as_uri()
    on_ranks(2, save_sharded, uri, tmp_path)
    model, optimizer = sharded(Ranks())
    take_steps(model, optimizer, range(4))
    for size in (1, 3):
        for answer in on_ranks(size, resume_sharded, uri, tmp_path):
            for name, value in model.named_parameters():
                torch.testing.assert_close(torch.tensor(answer[name]), value.detach(), rtol=1e-5, atol=1e-6)


@pytest.fixture
def s3() -> Iterator[Storage]:
    endpoint, bucket = os.environ.get("LAB_S3_ENDPOINT"), os.environ.get("LAB_S3_BUCKET")
    if not endpoint or not bucket:
        assert not os.environ.get("REQUIRE_LAB"), "REQUIRE_LAB is set, but LAB_S3_ENDPOINT is not: the lab is not up"
        pytest.skip("LAB_S3_ENDPOINT is not set: start the lab to test against its S3 server")
    storage = opened(f"s3://{bucket}/checkpoints-{uuid.uuid4().hex}")
    yield storage
    for entry in list(storage.list()):
        storage.delete(entry.path)


@pytest.mark.lab
def test_checkpoints_on_s3_are_restored_and_a_flipped_byte_is_noticed(s3: Storage, tmp_path: Path) -> None:
    on_ranks(2, save_two, s3.uri, tmp_path)
    answers = on_ranks(2, restore, s3.uri, tmp_path)
    assert [(found, value) for found, value, _, _ in answers] == [(Restored(200, {"seen": 200}), 200.0)] * 2
    flip_a_byte(s3, 200)
    answers = on_ranks(2, restore, s3.uri, tmp_path)
    assert [(found, value) for found, value, _, _ in answers] == [(Restored(100, {"seen": 100}), 100.0)] * 2
    assert answers[0][2][0].startswith(f"damaged checkpoint: {s3.uri}/{PREFIX}/step-00000200/attempt-")
    assert answers[0][2][0].endswith("; the checkpoint of step 100 is used instead")
    assert not list((tmp_path / "scratch").rglob("*.distcp"))
