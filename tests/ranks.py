"""Work on several processes that talk through gloo, as ranks of one step."""

from __future__ import annotations

import multiprocessing
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model_core.training.distributed import Ranks

DEADLINE_SECONDS = 120
PROCESSES = multiprocessing.get_context("forkserver")
# Each process would spend seconds on these imports.
PROCESSES.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "boto3", "pytest", "tests.checkpoint_parts", "model_core.training.checkpoint.files"]
)


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(ranks, *arguments)` returns on each of `size` processes, in order; fails when one fails or does not end."""
    rendezvous = f"/tmp/darkroom-ranks-{uuid.uuid4().hex}"
    pipes = [PROCESSES.Pipe(duplex=False) for _ in range(size)]
    processes = [
        PROCESSES.Process(target=_rank, args=(rank, size, rendezvous, pipes[rank][1], work, arguments), daemon=True) for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        results = []
        for rank, (receiver, _) in enumerate(pipes):
            assert receiver.poll(DEADLINE_SECONDS), f"rank {rank} of {size} hangs"
            result, failure = receiver.recv()
            assert failure is None, failure
            results.append(result)
        return results
    finally:
        for process in processes:
            process.join(5)
            process.kill()
        Path(rendezvous).unlink(missing_ok=True)


def _rank(rank: int, size: int, rendezvous: str, sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    try:
        sender.send((work(Ranks(rank, size, rank, size), *arguments), None))
    except BaseException:  # noqa: BLE001 - goes to the test that waits for it
        sender.send((None, f"rank {rank}: {traceback.format_exc()}"))
    dist.destroy_process_group()
