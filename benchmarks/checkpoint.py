"""Checkpoints on this machine: how long a save holds up training, and how fast one is stored and loaded.

Prints one JSON line a measurement, after one that says where it was taken. The baseline of a speed is a copy of the very
same files that reads, hashes (sha256), writes and syncs them; of a stall, a save that the loop waits for. Each round takes
baseline and subject in turn, so that a machine whose speed drifts does so for both; figures are medians over rounds, ratios
medians of the rounds' ratios. With LAB_S3_ENDPOINT and LAB_S3_BUCKET set, the same on that S3 server, whose baseline is one
upload and one download of the same bytes.

    python -m benchmarks.checkpoint > benchmarks/results/DATE-checkpoint.jsonl
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict  # as a step's optimizer does: the first save is not for waiting for imports

from benchmarks.machine import machine
from model_core.storage import S3Settings, Storage, open_storage
from model_core.training.checkpoint import CheckpointStore

ROUNDS, REMOTE_ROUNDS = 9, 3
STEPS_WATCHED = 40
CHUNK_BYTES = 1 << 20
SIZES = [(1024, 1024)] * 16 + [(4096, 1024)] * 2 + [(1024,)] * 64  # a quarter of the state: weights, two moments, their average


class Weights:
    """A part whose state is some tensors."""

    def __init__(self) -> None:
        self.tensors = {f"{copy}.{index}": torch.randn(size) for copy in range(4) for index, size in enumerate(SIZES)}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.tensors)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensors = state


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def copy_hashing(files: list[Path], target: Path) -> None:
    """The baseline: what storing or fetching files costs at least, one after the other."""
    target.mkdir()
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as source, (target / file.name).open("xb") as sink:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())


def tell(name: str, **figures: Any) -> None:
    print(json.dumps({"measure": name, **figures}), flush=True)


def speed(name: str, size: int, pairs: list[tuple[float, float]]) -> None:
    """Tells a speed and its ratio to the baseline, of (baseline, own) seconds."""
    tell(
        name,
        mib=round(size / 2**20, 1),
        rounds=len(pairs),
        mib_per_second=round(statistics.median(size / own for _, own in pairs) / 2**20, 1),
        baseline_mib_per_second=round(statistics.median(size / base for base, _ in pairs) / 2**20, 1),
        ratio_to_baseline=round(statistics.median(base / own for base, own in pairs), 3),
    )


def checked(text: str) -> None:
    """Nothing may fail in a benchmark."""
    if not text.startswith("resumed"):
        raise RuntimeError(text)


def measure_stall(store: CheckpointStore, weights: Weights) -> None:
    """(a) The wall time for which a save holds up the loop, and how much slower steps are while it goes on behind them."""
    matrix = torch.randn(512, 512)

    def step() -> None:
        matrix @ matrix @ matrix @ matrix

    first = seconds(lambda: store.save(0, {"weights": weights}, notes={}))
    store.wait()
    waited, stalls, alone, beside = [], [], [], []
    for number in range(ROUNDS):
        waited.append(seconds(lambda: (store.save(2 * number + 1, {"weights": weights}, notes={}), store.wait())))  # noqa: B023 - called here
        alone.append(statistics.mean(seconds(step) for _ in range(STEPS_WATCHED)))
        stalls.append(seconds(lambda: store.save(2 * number + 2, {"weights": weights}, notes={})))  # noqa: B023
        beside.append(statistics.mean(seconds(step) for _ in range(STEPS_WATCHED)))
        store.wait()
    tell(
        "stall of a step by an asynchronous save",
        rounds=ROUNDS,
        stall_seconds=round(statistics.median(stalls), 4),
        synchronous_seconds=round(statistics.median(waited), 4),
        ratio_to_synchronous=round(statistics.median(stall / wait for stall, wait in zip(stalls, waited, strict=True)), 3),
        first_stall_seconds=round(first, 4),
        steps_slower_meanwhile=round(statistics.median(slow / fast for slow, fast in zip(beside, alone, strict=True)), 2),
    )


def measure_files(folder: Path, make: Callable[[], CheckpointStore], weights: Weights) -> None:
    """(b) Speed of save and load in a folder, against a copy of the same files."""
    saves, loads, reads = [], [], []
    store = make()
    for number in range(ROUNDS):
        own = seconds(lambda: (store.save(number, {"weights": weights}, notes={}), store.wait()))  # noqa: B023 - called here
        files = sorted((folder / "store").glob(f"checkpoints/step-{number:08d}/attempt-*/*"))
        size = sum(file.stat().st_size for file in files)
        base = seconds(lambda: copy_hashing(files, folder / "copy"))  # noqa: B023
        shutil.rmtree(folder / "copy")
        load = seconds(lambda: make().restore({"weights": weights}))
        read = seconds(lambda: [hashlib.file_digest(file.open("rb"), "sha256") for file in files])  # noqa: B023
        saves.append((base, own))
        loads.append((base, load))
        reads.append((read, load))
    speed("save to a folder, against a hashing copy", size, saves)
    speed("load from a folder, against a hashing copy", size, loads)
    speed("load from a folder, against reading and hashing alone", size, reads)


def measure_remote(storage: Storage, folder: Path, make: Callable[[], CheckpointStore], weights: Weights) -> None:
    """The same on S3, against one upload and one download."""
    size = sum(tensor.nbytes for tensor in weights.tensors.values())
    (folder / "raw").write_bytes(os.urandom(size))
    sha256 = storage.upload("raw", folder / "raw")
    saves, loads = [], []
    store = make()
    for number in range(REMOTE_ROUNDS):
        up = seconds(lambda: storage.upload("raw", folder / "raw"))
        own = seconds(lambda: (store.save(number, {"weights": weights}, notes={}), store.wait()))  # noqa: B023 - called here
        down = seconds(lambda: storage.download("raw", folder / "fetched", sha256=sha256))
        load = seconds(lambda: make().restore({"weights": weights}))
        saves.append((up, own))
        loads.append((down, load))
    speed("save to S3, against one upload", size, saves)
    speed("load from S3, against one download", size, loads)


def main() -> None:
    """Measures on local files, and on S3 where there is one."""
    torch.manual_seed(0)
    weights = Weights()
    tell("machine", **machine())
    with tempfile.TemporaryDirectory(prefix="darkroom-benchmark-") as name:
        folder = Path(name)
        local = open_storage((folder / "store").as_uri())

        def make(storage: Storage = local) -> CheckpointStore:
            # Removing old ones is not what is measured, neither here nor in the baseline.
            return CheckpointStore(storage, "checkpoints", say=checked, scratch=folder / "scratch", keep_last=2 * ROUNDS + 2)

        measure_stall(make(), weights)
        make().clear()
        measure_files(folder, make, weights)
        endpoint, bucket = os.environ.get("LAB_S3_ENDPOINT"), os.environ.get("LAB_S3_BUCKET")
        if endpoint and bucket:
            remote = open_storage(f"s3://{bucket}/benchmark-{uuid.uuid4().hex}", S3Settings(endpoint_url=endpoint))
            try:
                measure_remote(remote, folder, lambda: make(remote), weights)
            finally:
                for entry in list(remote.list()):
                    remote.delete(entry.path)


if __name__ == "__main__":
    main()
