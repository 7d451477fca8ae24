"""The data plane on this machine: reading against bare pyarrow and WebDataset, reads a row group, padding, memory, plan.

Prints one JSON line a measurement. Compared ways run in turn, so that a machine whose speed drifts does so for both; figures are
medians over rounds. Every sample is 256 px: a latent of 64 x 16 x 16 in bfloat16, 32 KiB. S3 is measured where LAB_S3_ENDPOINT and
LAB_S3_BUCKET name a server.

    python -m benchmarks.data
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.machine import machine
from model_core.data.folders import LocalFolder, Shards
from model_core.data.index import Index, read_index
from model_core.data.latents import (
    CAPTIONS,
    PROMPTS,
    TRAIN,
    Bucket,
    LatentGroup,
    LatentRow,
    LatentWriter,
    Origin,
    latent_group,
    latent_rows,
)
from model_core.data.loader import Draws, Loader
from model_core.data.plan import Plan, Rows, make_plan
from model_core.data.row_groups import RowGroups
from model_core.models.segments import num_tokens
from model_core.recipe import MMDiTModel
from model_core.storage import S3Settings, Storage, open_storage

ROUNDS = 7
CHANNELS, SIDE = 64, 16
WINDOW, BATCH = 4, 256
TOKEN_BUDGET = 65_536
MODEL = MMDiTModel(num_layers=1, num_heads=1, head_dim=8, rope_axes=(2, 4, 2))  # of its settings a loader needs the layout alone
MiB = 1 << 20


class Remote:
    """The same data set in a store; counts requests."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.num_requests = storage, 0

    def local(self, name: str) -> Path | None:
        return None

    def read(self, name: str, *, start: int, length: int) -> bytes:
        self.num_requests += 1
        return self.storage.get(name, start=start, length=length)


def write_data_set(root: Path, num: int) -> Index:
    """`num` samples of noise, which compresses no better than latents do, with captions."""
    root.mkdir(parents=True, exist_ok=True)
    writer = LatentWriter(root, origin=Origin("v" * 64, "e" * 64), channels=CHANNELS)
    noise = torch.randn(64, CHANNELS, SIDE, SIDE)
    for number in range(num):
        words = {"instruction": "", **{name: f"{name} caption of sample {number}, some twenty words long " * 4 for name in CAPTIONS}}
        row = LatentRow(
            sample_id=number.to_bytes(16, "big"),
            latent=noise[number % 64],
            references=[],
            prompts=words,
            prompt_tokens=dict.fromkeys(PROMPTS, 40),
        )
        writer.add(Bucket(TRAIN, "image", SIDE, SIDE, 0), row)
    return writer.close()


def plan_of(index: Index, *, batch_size: int = BATCH) -> Plan:
    rows = latent_rows(index, kinds=("image",))
    return make_plan(digest=index.digest, seed=0, stage="S1", rows=rows, shares={"image": 1.0}, batch_size=batch_size, window=WINDOW)


def groups_of(shards: Shards, index: Index) -> RowGroups[LatentGroup]:
    return RowGroups(shards, index, latent_group, capacity=2 * (WINDOW + 1), say=print)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def alternated(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float, float]:
    """Median seconds of both, and the median of theirs / ours a round: how many times faster ours is."""
    rounds = [(seconds(ours), seconds(theirs)) for _ in range(ROUNDS)]
    return statistics.median(o for o, _ in rounds), statistics.median(t for _, t in rounds), statistics.median(t / o for o, t in rounds)


def say(measurement: str, **figures: object) -> None:
    print(json.dumps({"measurement": measurement, **figures}), flush=True)


def local_reading(root: Path, index: Index) -> None:
    """Row groups in the plan's order from local files, against bare pyarrow in the files' order."""
    num_bytes = sum(index[number].length for number in range(len(index)))
    order = list(
        dict.fromkeys(group for number in range(index.num_rows // BATCH) for group in plan_of(index).batch(number).groups.tolist())
    )

    def bare() -> None:
        for path in index.paths:
            file = pq.ParquetFile(root / path)
            for group in range(file.num_row_groups):
                file.read_row_group(group)

    def ours(groups: RowGroups[LatentGroup]) -> None:
        for number in order:
            groups.get(number)

    first = [(seconds(lambda: ours(groups_of(LocalFolder(root), index))), seconds(bare)) for _ in range(ROUNDS)]
    groups = RowGroups(LocalFolder(root), index, latent_group, capacity=1, say=print)
    ours(groups)
    own, theirs, ratio = alternated(lambda: ours(groups), bare)
    say(
        "row groups from local files against a bare pyarrow read",
        gigabytes_per_second=round(num_bytes / own / 1e9, 2),
        bare_gigabytes_per_second=round(num_bytes / theirs / 1e9, 2),
        ratio=round(ratio, 3),
        goal=0.8,
        ratio_of_the_first_pass_which_checks_sha256=round(statistics.median(t / o for o, t in first), 3),
    )


def whole_batches(root: Path, index: Index) -> None:
    """The whole loader, with noise, times and prompts: what training waits for when its own step costs nothing."""
    for workers in (0, 2):
        loader = Loader(
            groups_of(LocalFolder(root), index), plan_of(index), Draws((0.0, 1.0), 0.1, {"general": 1.0}), MODEL, workers=workers
        )
        last = index.num_rows // BATCH
        took = seconds(lambda loader=loader, last=last: [None for _ in loader.stream(0, last)])  # type: ignore[misc]
        say("whole batches with noise", workers=workers, samples_per_second=round(last * BATCH / took))


def s3_reading(root: Path, index: Index) -> None:
    """Samples a second from S3 against WebDataset on the same latents and captions, both with two workers."""
    endpoint, bucket = os.environ.get("LAB_S3_ENDPOINT"), os.environ.get("LAB_S3_BUCKET")
    if not endpoint or not bucket:
        say("samples from S3 against WebDataset", skipped="LAB_S3_ENDPOINT and LAB_S3_BUCKET are not set")
        return
    storage = open_storage(f"s3://{bucket}/benchmark-{uuid.uuid4().hex}", S3Settings(endpoint_url=endpoint))
    try:
        for path in index.paths:
            storage.upload(path, root / path)
        tars = list(_write_tars(root, index, storage))
        requests: list[float] = []

        def ours() -> int:
            shards, num = Remote(storage), 0
            groups, plan = groups_of(shards, index), plan_of(index)
            loader = SampleReader(groups, plan, Draws((0.0, 1.0), 0.0, {"general": 1.0}), workers=2)
            for batch in loader.stream(0, index.num_rows // BATCH):
                num += len(batch)
            requests.append(shards.num_requests / len(index))
            return num

        def theirs() -> int:
            return sum(len(latents) for latents, _ in _webdataset(endpoint, storage.uri, tars))

        assert ours() == theirs() == index.num_rows // BATCH * BATCH
        own, other, ratio = alternated(ours, theirs)
        say(
            "samples from S3 against WebDataset",
            samples_per_second=round(index.num_rows / own),
            webdataset_samples_per_second=round(index.num_rows / other),
            ratio=round(ratio, 2),
            goal=2.0,
        )
        say("reads a row group from S3", reads=round(max(requests), 3), goal=1.05)
    finally:
        for entry in list(storage.list()):
            storage.delete(entry.path)


class SampleReader(Loader):
    """The loader up to what WebDataset does: stored latents and captions in batches, without noise and times."""

    def batch(self, number: int) -> Any:
        samples = self.plan.share(number, rank=0, size=1)
        latents, prompts = [], []
        for group_number in dict.fromkeys(samples.groups.tolist()):
            group = self.groups.get(group_number)
            assert group is not None
            rows = samples.rows[samples.groups == group_number]
            latents.append(group.latents[rows])
            prompts += [group.prompts["general"][row] for row in rows.tolist()]
        return torch.from_numpy(np.concatenate(latents).view(np.int16)).view(torch.bfloat16)


def _write_tars(root: Path, index: Index, storage: Storage) -> Iterator[str]:
    for number, path in enumerate(index.paths):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            file = pq.ParquetFile(root / path)
            for position in range(file.num_row_groups):
                group = latent_group(file.read_row_group(position), path)
                for row, key in enumerate(group.sample_ids):
                    captions = json.dumps({name: group.prompts[name][row] for name in PROMPTS}).encode()
                    for suffix, data in (("latent", group.latents[row].tobytes()), ("json", captions)):
                        info = tarfile.TarInfo(f"{key.hex()}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        name = f"tars/{number:05d}.tar"
        storage.put(name, buffer.getvalue())
        yield name


def _webdataset(endpoint: str, uri: str, tars: list[str]) -> Iterator[tuple[torch.Tensor, list[str]]]:
    import boto3
    import webdataset

    def stream(source: Iterator[dict[str, str]]) -> Iterator[dict[str, Any]]:
        client = boto3.client("s3", endpoint_url=endpoint, region_name=os.environ.get("AWS_DEFAULT_REGION", "us-east-1"))
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        for sample in source:
            yield {"url": sample["url"], "stream": client.get_object(Bucket=bucket, Key=f"{prefix}/{sample['url']}")["Body"]}

    def collate(batch: list[tuple[bytes, bytes]]) -> tuple[torch.Tensor, list[str]]:
        latents = np.stack([np.frombuffer(latent, dtype=np.int16) for latent, _ in batch])
        return torch.from_numpy(latents).view(torch.bfloat16), [json.loads(words)["general"] for _, words in batch]

    data = webdataset.DataPipeline(
        webdataset.SimpleShardList(tars),
        webdataset.split_by_worker,
        stream,
        webdataset.tariterators.tar_file_expander,
        webdataset.tariterators.group_by_keys,
        webdataset.shuffle(WINDOW * 512),
        webdataset.to_tuple("latent", "json"),
        webdataset.batched(BATCH, collation_fn=collate, partial=True),
    )
    yield from torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")


def useful_tokens() -> None:
    """Share of a pass's token budget that is used, for captions that follow the log-normal mix with a mean of 231 tokens.

    A packed stream holds no padding; what is lost is what the last sample of a pass leaves of the budget.
    """
    for side_px in (256, 512, 1024):
        with tempfile.TemporaryDirectory() as folder:
            side = side_px // 16
            index = _captioned(Path(folder), side, num=2048)
            draws = Draws((0.0, 1.0), 0.0, {"general": 1.0})
            loader = Loader(groups_of(LocalFolder(Path(folder)), index), plan_of(index), draws, MODEL, TOKEN_BUDGET)
            micro = [part for number in range(4) for part in loader.batch(number).micro_batches]
            lengths = [num_tokens(sample[0]) + num_tokens(sample[1]) for part in micro for sample in part.samples]
            say(
                "share of useful tokens",
                px=side_px,
                batch_size=BATCH,
                token_budget=TOKEN_BUDGET,
                share=round(sum(len(part.stream) for part in micro) / (len(micro) * TOKEN_BUDGET), 4),
                goal=0.97,
                mean_micro_batch=round(len(lengths) / len(micro), 1),
                padded_to_the_longest_of_the_batch=round(sum(lengths) / (len(lengths) * max(lengths)), 3),
            )


def _captioned(root: Path, side: int, *, num: int) -> Index:
    """One-channel latents whose captions are log-normal in length: median 155, sigma 0.9, at most 1,024 tokens, mean near 231."""
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(165), 0.9, num).round(), 4, 1024).astype(int)
    writer = LatentWriter(root, origin=Origin("v" * 64, "e" * 64), channels=1)
    latent = torch.zeros(1, side, side)
    for number, length in enumerate(lengths.tolist()):
        prompts = dict.fromkeys(PROMPTS, "x")
        row = LatentRow(
            sample_id=number.to_bytes(16, "big"),
            latent=latent,
            references=[],
            prompts=prompts,
            prompt_tokens=dict.fromkeys(PROMPTS, length),
        )
        writer.add(Bucket(TRAIN, "image", side, side, 0), row)
    say("log-normal captions", mean_tokens=round(float(lengths.mean()), 1), max_tokens=int(lengths.max()))
    return writer.close()


def large_plan() -> None:
    """A plan over 10^9 samples in row groups of 512, in a process of its own."""
    code = "from benchmarks.data import plan_a_billion; plan_a_billion()"
    subprocess.run([sys.executable, "-c", code], check=True)


def plan_a_billion() -> None:
    """Times cold and warm batches, and the memory of this process."""
    num = -(-(10**9) // 512)
    rows = {"image": Rows(np.arange(num), np.full(num, 512, dtype=np.int32))}
    plan = make_plan(digest="d", seed=0, stage="S1", rows=rows, shares={"image": 1.0}, batch_size=4096, window=8)
    cold = seconds(lambda: plan.batch(123_456))
    warm = [seconds(lambda number=number: plan.batch(number)) for number in range(123_457, 123_557)]  # type: ignore[misc]
    far = seconds(lambda: plan.batch(10**12))
    say(
        "plan over 10^9 samples",
        cold_seconds=round(max(cold, far), 3),
        warm_milliseconds_p50=round(statistics.median(warm) * 1e3, 2),
        warm_milliseconds_p99=round(sorted(warm)[98] * 1e3, 2),
        peak_mebibytes=peak_mebibytes(),
        goals=[2.0, 5.0, 1024],
    )


def memory(root: Path) -> None:
    """Peak memory of a process that reads a data set through, larger than its windows, and ten times as much."""
    peaks = {}
    for num in (8_192, 81_920):
        folder = root / str(num)
        write_data_set(folder, num)
        code = f"from benchmarks.data import read_through; read_through({str(folder)!r})"
        peaks[num] = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    small, large = peaks.values()
    say("peak memory for ten times the data", mebibytes=[small, large], ratio=round(large / small, 3), goal=1.1)


def read_through(folder: str) -> None:
    """Reads one epoch, as from a store, and prints the peak memory of this process in MiB."""
    storage = open_storage(Path(folder).as_uri())
    index = read_index(LocalFolder(Path(folder)))
    loader = Loader(groups_of(Remote(storage), index), plan_of(index), Draws((0.0, 1.0), 0.1, {"general": 1.0}), MODEL, workers=2)
    for _ in loader.stream(0, index.num_rows // BATCH):
        pass
    print(peak_mebibytes())


def peak_mebibytes() -> int:
    """Peak memory of this process. Not by getrusage, whose figure a child takes over from the process that forked it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def main() -> None:
    """All measurements."""
    say("machine", **machine())
    large_plan()
    useful_tokens()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        index = write_data_set(root / "set", 16_384)
        local_reading(root / "set", index)
        whole_batches(root / "set", index)
        s3_reading(root / "set", index)
        memory(root)


if __name__ == "__main__":
    main()
