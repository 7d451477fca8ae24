"""Student against teacher: the same prompts and seeds drawn by each, and read by the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model_core.evaluation.before_after import FixedPrompt, judged, sign_flip_p
from model_core.evaluation.drawing import Painter, Request, draw
from model_core.evaluation.judge import Judge
from model_core.training.policy_merging import kind_of

NUM_SHOWN = 12  # rows of pictures, half of them edits


@dataclass(frozen=True)
class Compared:
    """One drawer's pictures of the fixed prompts, and what the judge says of them; `right` is the share of what each prompt asked."""

    pictures: list[Image.Image]
    judge: dict[str, float]
    right: np.ndarray


def draw_compared(painter: Painter, fixed: Sequence[FixedPrompt], judge: Judge | None) -> Compared:
    """Draws the fixed prompts as the painter samples, and has them judged where there is a judge."""
    requests = [Request(each.prompt.prompt, each.seed, each.prompt.size_px, each.prompt.sources) for each in fixed]
    pictures = draw(painter, requests, on_drawn=lambda _: None)
    if judge is None:
        return Compared(pictures, {}, np.zeros(0))
    right = []
    for each, picture in zip(fixed, pictures, strict=True):
        if each.asked:
            reading = judge.read(picture)
            right.append(float(np.mean([getattr(reading, name) == value for name, value in each.asked.items()])))
    return Compared(pictures, judged(judge, fixed, pictures), np.array(right))


def compare_drawn(drawn: Mapping[str, Compared], *, seed: int) -> dict[str, Any]:
    """The judge's scores by drawer, the student's share of the teacher's, and how likely its lead on the teacher's few steps is chance.

    `p` is that of a paired sign-flip test of the share of what each prompt asked, by rival: the teacher in as many steps, and in as
    many network evaluations. Empty without a judge.
    """
    scores = {name: each.judge for name, each in drawn.items()}
    if not scores["student"]:
        return {"judge": scores, "share_of_teacher": None, "p": {}}
    rivals = [name for name in drawn if name not in ("teacher", "student")]
    return {
        "judge": scores,
        "share_of_teacher": scores["student"]["judge/mean"] / max(scores["teacher"]["judge/mean"], 1e-12),
        "p": {name: sign_flip_p(drawn["student"].right - drawn[name].right, seed=seed) for name in rivals},
    }


def save_pictures(output: Path, fixed: Sequence[FixedPrompt], drawn: Mapping[str, Compared]) -> list[dict[str, Any]]:
    """Saves what the report shows: the first fixed prompts and the first edits, by every drawer; returns where."""
    kinds = [kind_of(each.prompt) for each in fixed]
    chosen: list[int] = []
    for kind in ("image", "edit"):
        chosen += [index for index in range(len(fixed)) if kinds[index] == kind][: NUM_SHOWN // 2]
    folder = output / "students"
    folder.mkdir()
    shown = []
    for index in chosen:
        each = fixed[index]
        row = {name: one.pictures[index] for name, one in drawn.items()}
        row |= {f"source{slot}": source for slot, source in enumerate(each.prompt.sources)}
        names = {}
        for name, picture in row.items():
            path = folder / f"{index:03d}-{name}.png"
            picture.save(path)
            names[name] = f"{folder.name}/{path.name}"
        shown.append({"index": index, "prompt": each.prompt.prompt, "kind": kinds[index], "seed": each.seed, "pictures": names})
    return shown


def brightness(pictures: Sequence[Image.Image]) -> dict[str, float]:
    """Mean and standard deviation of pictures' values, 0 to 1: where they drift, the fake score lags."""
    values = np.stack([np.asarray(picture, dtype=np.float64) / 255 for picture in pictures])
    return {"picture_mean": float(values.mean()), "picture_std": float(values.std())}
