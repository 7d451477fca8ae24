"""The few-step student's own sampler: predict the clean picture, noise it again to the next time of a fixed grid (DMD2, arXiv 2405.14867).

A student is distilled for this sampler and this grid; any other would draw something else. So both are written beside its weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from model_core.objectives.flow import shift_mu, shift_time

FILE_NAME = "sampler.json"


@dataclass(frozen=True)
class FewStep:
    """The grid: equal steps, moved towards noise by `shift_mu` at 256 and 8192 tokens, as the teacher's are."""

    steps: int
    shift_mu: tuple[float, float]

    def times(self, num_tokens: int) -> list[float]:
        """Times at which the student is asked, from 1 down, for pictures of `num_tokens` latent tokens."""
        mu = shift_mu(num_tokens, self.shift_mu)
        return [shift_time(1.0 - step / self.steps, mu=mu) for step in range(self.steps)]


def few_step(
    velocity: Callable[[Tensor, float], Tensor], noise: Tensor, times: list[float], *, step_noise: Callable[[int], Tensor]
) -> Tensor:
    """Clean latents from noise (B, N, C): x0 = x - t v at each time; between, x = (1 - t') x0 + t' `step_noise(step)`."""
    x = noise
    for step, t in enumerate(times):
        clean = clean_prediction(x, velocity(x, t), t)
        if step + 1 < len(times):
            x = renoise(clean, step_noise(step), times[step + 1])
    return clean


def clean_prediction(x: Tensor, velocity: Tensor, t: float | Tensor) -> Tensor:
    """x0 = x - t v in fp64, as in DMD2's code: near t = 1 the difference of two large values is what is wanted."""
    return x.double() - t * velocity.double()


def renoise(clean: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
    """(1 - t) x0 + t eps, fp32."""
    return ((1 - t) * clean + t * noise).float()


def save_sampler(sampler: FewStep, folder: Path) -> None:
    """Writes the sampler beside a student's weights."""
    (folder / FILE_NAME).write_text(json.dumps(asdict(sampler), indent=2, sort_keys=True) + "\n")


def load_sampler(folder: Path) -> FewStep | None:
    """The sampler of the student in `folder`; None for weights of a flow, which have none."""
    if not (folder / FILE_NAME).is_file():
        return None
    document = json.loads((folder / FILE_NAME).read_text())
    return FewStep(int(document["steps"]), (float(document["shift_mu"][0]), float(document["shift_mu"][1])))
