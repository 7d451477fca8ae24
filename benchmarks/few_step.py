"""Time for a whole picture: the student's four steps against the guided teacher's forty, on this machine.

Prints one JSON line a size and batch: text encoding, every evaluation of the network and decoding, with the demo's model and random
weights. Teacher and student draw in turn, so that a machine whose speed drifts does so for both; the ratio is student over
teacher, medians over rounds. `parts` tells where a student's time goes: `text` is encoding the prompts, `decoding` the autoencoder,
`network` its four evaluations with the reading of the prompts, `rest` noise and sums.

    python -m benchmarks.few_step
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.alignment import PROMPTS, artist_of
from benchmarks.machine import machine
from benchmarks.training_steps import seconds
from model_core.recipe import Recipe, Sampling, load_recipe
from model_core.sampling import pipeline
from model_core.sampling.few_step import FewStep
from model_core.sampling.pipeline import sample

ROUNDS = 5
TEACHER, STUDENT = Sampling(steps=40), FewStep(4, Sampling().shift_mu)
STUDENT_DRAWS = 10  # in a row, so that other work on the machine disturbs both alike


def main() -> None:
    """Measures both sizes at both batches."""
    print(json.dumps({"machine": machine()}))
    recipe = load_recipe(Path("pipelines/recipes/demo.yaml"))
    for side_px in (64, 256):
        for batch in (1, 32):
            measure(recipe, side_px=side_px, batch=batch)


def measure(recipe: Recipe, *, side_px: int, batch: int) -> None:
    """Says how long a picture takes of both, and their ratio."""
    artist, model = artist_of(recipe)
    model.eval()
    artist.vae.eval()
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(batch)]

    def draw(sampling: Sampling | FewStep) -> None:
        known: dict[str, Any] = {"size_px": (side_px, side_px), "seeds": range(batch), "sampling": sampling}
        sample(model, artist.vae, artist.encoder, prompts, **known)

    def draw_often(who: str) -> None:
        for _ in range(STUDENT_DRAWS if who == "student" else 1):
            draw(STUDENT if who == "student" else TEACHER)

    for sampling in (STUDENT, TEACHER):
        draw(sampling)
    rounds = []
    for number in range(ROUNDS):
        order = ("teacher", "student") if number % 2 else ("student", "teacher")
        taken = {who: seconds(lambda who=who: draw_often(who)) for who in order}
        rounds.append((taken["student"] / STUDENT_DRAWS, taken["teacher"]))
    ratio = statistics.median(student / teacher for student, teacher in rounds)
    student, teacher = (statistics.median(each) / batch for each in zip(*rounds, strict=True))
    said = {"what": "picture", "px": side_px, "batch": batch, "student_s": round(student, 5), "teacher_s": round(teacher, 5)}
    said |= {"student_over_teacher": round(ratio, 4), "parts": parts(lambda: draw(STUDENT))}
    print(json.dumps(said | {"steps": [STUDENT.steps, TEACHER.steps], "rounds": ROUNDS}), flush=True)


def parts(draw: Callable[[], None]) -> dict[str, float]:
    """Shares of a drawing's time, medians over rounds."""
    rounds: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        spent: dict[str, float] = {}
        with timed("encode_conditions", "text", spent), timed("decode_pictures", "decoding", spent), network_timed(spent):
            whole = seconds(draw)
        rounds.append({name: value / whole for name, value in (spent | {"rest": whole - sum(spent.values())}).items()})
    return {name: round(statistics.median(each[name] for each in rounds), 3) for name in rounds[0]}


@contextmanager
def timed(function: str, name: str, spent: dict[str, float]) -> Iterator[None]:
    """Adds the seconds that a function of the sampler takes to `spent[name]`."""
    plain = getattr(pipeline, function)

    def measured(*arguments: Any, **named: Any) -> Any:
        found: list[Any] = []
        spent[name] = spent.get(name, 0.0) + seconds(lambda: found.append(plain(*arguments, **named)))
        return found[0]

    setattr(pipeline, function, measured)
    try:
        yield
    finally:
        setattr(pipeline, function, plain)


@contextmanager
def network_timed(spent: dict[str, float]) -> Iterator[None]:
    """Adds the seconds of evaluations, and of reading the prompts once, to `spent["network"]`."""
    plain = pipeline.sampling_velocity

    def measured(*arguments: Any) -> Any:
        found: list[Any] = []
        spent["network"] = seconds(lambda: found.append(plain(*arguments)))

        def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            velocities: list[torch.Tensor] = []
            spent["network"] += seconds(lambda: velocities.append(found[0](x, t)))
            return velocities[0]

        return denoise

    pipeline.sampling_velocity = measured
    try:
        yield
    finally:
        pipeline.sampling_velocity = plain


if __name__ == "__main__":
    main()
