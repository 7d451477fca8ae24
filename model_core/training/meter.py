"""How fast a training loop goes and how well it uses its time, between two points of its curves and since its first attempt."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model_core.training.throughput import GPUS, flops_utilisation, goodput


def peak_flops_of_this_gpu() -> float | None:
    """Dense bf16 peak of the GPU at hand, FLOP/s; None on a CPU or for a GPU that `throughput.GPUS` does not know."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower()
    return next((gpu.peak_flops for known, gpu in sorted(GPUS.items(), reverse=True) if known in name), None)


@dataclass
class Meter:
    """Counts optimizer steps. `began_at` (Unix seconds) is when the first attempt began, of which `good_steps` may be left.

    `clock` tells Unix seconds, and `peak_flops` is that of one GPU, None where it is not known.
    """

    num_gpus: int
    peak_flops: float | None
    began_at: float
    good_steps: int = 0
    clock: Callable[[], float] = time.time
    _steps: int = 0
    _seconds: float = 0.0
    _tokens: int = 0
    _flops: float = 0.0
    _all_steps: int = 0
    _all_seconds: float = 0.0

    def add(self, seconds: float, *, tokens: int, flops: float, good: bool) -> None:
        """Counts one step: its time without waiting for data, and its tokens and model FLOPs on all ranks."""
        self._steps, self._seconds = self._steps + 1, self._seconds + seconds
        self._tokens, self._flops = self._tokens + tokens, self._flops + flops
        self._all_steps, self._all_seconds = self._all_steps + 1, self._all_seconds + seconds
        self.good_steps += good

    def close(self) -> dict[str, float]:
        """Numbers since the last call, by their names in the curves: speed, and MFU where the peak is known; goodput since the start."""
        numbers = {
            "train/step_seconds": self._seconds / self._steps,
            "train/tokens_per_second": self._tokens / self._seconds,
            "train/teraflops": self._flops / self._seconds / 1e12,
            "train/goodput": goodput(
                steps=self.good_steps,
                repeated_steps=0,
                skipped_steps=0,
                step_seconds=self._all_seconds / self._all_steps,
                wall_seconds=max(self.clock() - self.began_at, 1e-9),
            ),
        }
        if self.peak_flops is not None:
            numbers["train/mfu"] = flops_utilisation(self._flops, seconds=self._seconds, peak_flops=self.peak_flops, gpus=self.num_gpus)
        self._steps, self._seconds, self._tokens, self._flops = 0, 0.0, 0, 0.0
        return numbers

    def state_dict(self) -> dict[str, float]:
        """What the next attempt goes on from, as JSON values."""
        return {"began_at": self.began_at, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes up what `state_dict` gave."""
        self.began_at, self.good_steps = state["began_at"], int(state["good_steps"])
