"""Checkpoints of one process: what comes back, and what becomes of damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model_core.storage import Storage, StorageError
from model_core.training.checkpoint import CheckpointStore, Restored
from tests.checkpoint_parts import PREFIX, Part, RemoteStorage, files, folder, restored, save, weights


def test_state_comes_back_bitwise_with_its_notes(storage: Storage, store_of: Callable[..., CheckpointStore]) -> None:
    torch.manual_seed(0)
    tensors = {
        "half": torch.randn(5, 3).bfloat16(),
        "double": torch.randn(7, dtype=torch.float64),
        "counts": torch.arange(4),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 2),
        "transposed": torch.randn(4, 6).t(),
        "part of a larger one": torch.randn(10, 2)[3:5],
        "not a number": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    store = store_of(storage)
    store.save(7, {"part": Part({"tensors": tensors, "loss": [0.1, float("inf")], "betas": (0.9, 0.99)})}, notes={"seen": [1, {"x": 0.1}]})
    store.wait()
    part = Part({})
    assert store_of(storage).restore({"part": part}) == Restored(7, {"seen": [1, {"x": 0.1}]})
    assert part.state["loss"] == [0.1, float("inf")]
    assert part.state["betas"] == (0.9, 0.99)
    for name, tensor in saved.items():
        found = part.state["tensors"][name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_restoring_writes_into_the_tensors_that_are_there(storage: Storage, store_of: Callable[..., CheckpointStore]) -> None:
    save(store_of(storage), 100)
    parts = weights(-1.0)
    own = parts["model"].state["w"]
    store_of(storage).restore(parts)
    assert parts["model"].state["w"] is own
    assert own[0, 0] == 100.0


def test_a_save_holds_the_state_of_its_moment_though_training_goes_on(storage: Storage, store_of: Callable[..., CheckpointStore]) -> None:
    store, parts = store_of(storage, keep_last=3), weights(1.0)
    for value in (1.0, 2.0, 3.0):
        parts["model"].state["w"].fill_(value)
        parts["model"].state["b"].fill_(value)
        parts["curves"].state["points"][0]["loss"] = value
        store.save(int(value), parts, notes={})
        parts["model"].state["w"].fill_(-value)
        parts["curves"].state["points"][0]["loss"] = -value
    store.wait()
    assert restored(store_of(storage)) == (3, 3.0)
    (Path(storage.uri.removeprefix("file://")) / PREFIX / "step-00000003" / "COMMIT.json").unlink()
    assert restored(store_of(storage)) == (2, 2.0)


def test_copies_in_memory_are_reused(storage: Storage, store_of: Callable[..., CheckpointStore]) -> None:
    store, tensors = store_of(storage), {"w": torch.zeros(1000)}
    assert store._staged(tensors)["w"].data_ptr() == store._staged(tensors)["w"].data_ptr() != tensors["w"].data_ptr()


def test_the_newest_is_used_and_said(storage: Storage, store_of: Callable[..., CheckpointStore], said: list[str]) -> None:
    assert restored(store_of(storage)) is None
    for step in (100, 200):
        save(store_of(storage), step)
    assert restored(store_of(storage)) == (200, 200.0)
    assert said == ["resumed after step 200"]


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


OTHER = "its bytes are not the promised ones"
DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "flipped byte": ("attempt-*/__0_0.distcp", flip_a_byte, f"__0_0.distcp: {OTHER}"),
    "flipped byte of the metadata": ("attempt-*/.metadata", flip_a_byte, f".metadata: {OTHER}"),
    "truncated": (
        "attempt-*/__0_0.distcp",
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        f"__0_0.distcp: {OTHER}",
    ),
    "missing": ("attempt-*/values.json", Path.unlink, "values.json: not found"),
    "empty commit": ("COMMIT.json", lambda path: path.write_bytes(b""), "COMMIT.json: not a commit (not JSON)"),
    "commit of something else": ("COMMIT.json", lambda path: path.write_bytes(b"{}"), "COMMIT.json: not a commit ("),
    "commit that points elsewhere": (
        "COMMIT.json",
        lambda path: path.write_bytes(path.read_bytes().replace(b"values.json", b"../values.json")),
        "COMMIT.json: not a commit (",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_said_in_one_line_and_the_one_before_it_used(
    storage: Storage, store_of: Callable[..., CheckpointStore], said: list[str], tmp_path: Path, damage: str
) -> None:
    for step in (100, 200):
        save(store_of(storage), step)
    pattern, harm, message = DAMAGES[damage]
    harm(next(folder(tmp_path, 200).glob(pattern)))
    assert restored(store_of(storage)) == (100, 100.0)
    assert said[0].startswith(f"damaged checkpoint: {storage.uri}/{PREFIX}/step-00000200/")
    assert message in said[0]
    assert said[0].endswith("; the checkpoint of step 100 is used instead")
    assert said[1:] == ["resumed after step 100"]


def test_with_no_sound_checkpoint_training_starts_anew(
    storage: Storage, store_of: Callable[..., CheckpointStore], said: list[str], tmp_path: Path
) -> None:
    save(store_of(storage), 100)
    flip_a_byte(next(folder(tmp_path, 100).glob("attempt-*/__0_0.distcp")))
    assert restored(store_of(storage)) is None
    assert said[0].endswith("; training starts from nothing")


@pytest.mark.parametrize(("again", "newest", "kept"), [(200, 200, [100, 200]), (150, 150, [100, 150])])
def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again_and_does_not_count_among_those_kept(
    storage: Storage, store_of: Callable[..., CheckpointStore], tmp_path: Path, again: int, newest: int, kept: list[int]
) -> None:
    for step in (100, 200):
        save(store_of(storage), step)
    flip_a_byte(next(folder(tmp_path, 200).glob("attempt-*/__0_0.distcp")))
    store = store_of(storage)
    restored(store)
    save(store, again)
    assert files(tmp_path) == [f"step-{step:08d}" for step in kept]
    assert restored(store_of(storage)) == (newest, float(newest))


def test_a_store_that_cannot_be_read_is_no_damage(remote: RemoteStorage, store_of: Callable[..., CheckpointStore], said: list[str]) -> None:
    save(store_of(remote), 100)
    remote.fails = lambda method, path: method == "download"
    with pytest.raises(StorageError, match=r"step-00000100/attempt-.*: no route to host"):
        store_of(remote).restore(weights(0.0))
    assert said == []


def test_a_checkpoint_of_other_parts_is_refused(storage: Storage, store_of: Callable[..., CheckpointStore]) -> None:
    save(store_of(storage), 100)
    with pytest.raises(ValueError, match="checkpoint of step 100: holds curves, model; found model"):
        store_of(storage).restore({"model": Part({})})


def test_the_commit_tells_what_was_written(storage: Storage, store_of: Callable[..., CheckpointStore], tmp_path: Path) -> None:
    save(store_of(storage), 100)
    commit = json.loads((folder(tmp_path, 100) / "COMMIT.json").read_bytes())
    assert (commit["step"], commit["world_size"], commit["notes"]) == (100, 1, {"seen": 100})
    sizes = {file["path"]: file["bytes"] for file in commit["files"]}
    assert sizes == {path.name: path.stat().st_size for path in folder(tmp_path, 100).glob("attempt-*/*")}


def test_notes_that_are_no_json_are_refused_before_anything_is_written(
    storage: Storage, store_of: Callable[..., CheckpointStore], tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        store_of(storage).save(100, weights(1.0), notes={"path": tmp_path})
    assert files(tmp_path) == []
