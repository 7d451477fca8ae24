"""The processes of one training step: who is who, and what they tell each other. One process needs no process group.

Models know nothing of this: gradients are summed from outside, after the backward pass.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

# The first rank may wait as long for a step that another launcher is doing, and the others for it. A rank that dies is no reason to
# time out: torchrun ends the others.
PATIENCE = timedelta(hours=24)
PR_SET_PDEATHSIG = 1  # linux/prctl.h

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its step. `local_*` count those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: Any = None  # the process group they talk through; None: torch.distributed's own

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that claims, reports and commits."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks in order, on every rank. All must call it."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, value: Value | None) -> Value:
        """Rank 0's value on every rank. All must call it."""
        return self.gather(value)[0]  # type: ignore[return-value]

    def share(self, num: int) -> range:
        """Which of `num` things are this rank's: contiguous, and sizes differ by at most one."""
        return range(self.rank * num // self.size, (self.rank + 1) * num // self.size)


ALONE = Ranks()


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Joins the process group that torchrun's environment describes, and leaves it; without one, this process is alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    finally:
        dist.destroy_process_group()


def die_with_launcher() -> None:
    """To be called in a rank: the kernel kills it when torchrun dies, so that none trains on by itself (Linux)."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def sum_over_ranks(value: Any, ranks: Ranks) -> Any:
    """The sum of a tensor over all ranks, on every rank."""
    if ranks.size > 1:
        import torch.distributed as dist

        dist.all_reduce(value)
    return value


def max_over_ranks(value: Any, ranks: Ranks) -> Any:
    """The largest value of a tensor on any rank, on every rank."""
    if ranks.size > 1:
        import torch.distributed as dist

        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def sum_gradients(parameters: Iterable[Any], ranks: Ranks) -> None:
    """Adds up the gradients of all ranks, in one message; a parameter without a gradient counts as zero.

    Those of sharded parameters have been added up by the backward pass.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad and not hasattr(parameter, "to_local")]
    if ranks.size == 1 or not trained:
        return
    import torch
    import torch.distributed as dist

    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.reshape(-1) for parameter in trained])
    dist.all_reduce(flat)
    for parameter, part in zip(trained, flat.split([parameter.numel() for parameter in trained]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))


def local(tensor: Any) -> Any:
    """This rank's part of a sharded tensor; a plain one as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Any) -> Any:
    """A sharded tensor put together, on every rank; a plain one as it is. All ranks must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_sharded(model: Any) -> bool:
    """Whether the model's parameters lie in parts on several ranks."""
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())


def compute_device(ranks: Ranks = ALONE) -> Any:
    """Where models of this rank work: its GPU where there are any, else the CPU."""
    import torch

    return torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def frozen_dtype(device: Any) -> Any:
    """Of frozen transformers' weights and passes: bfloat16 on a GPU, as they are published; fp32 on a CPU, which has no units for it."""
    import torch

    return torch.bfloat16 if device.type == "cuda" else torch.float32


def keep_deterministic(device: Any) -> None:
    """Refuses, on a CPU, operations that give other bits when repeated. On a GPU those that do not are several times as fast."""
    import torch

    torch.use_deterministic_algorithms(device.type == "cpu")
