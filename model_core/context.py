"""What a step is given to work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model_core.progress import Progress
from model_core.recipe import Recipe
from model_core.site import Site
from model_core.tracking.spool import Tracker
from model_core.training.checkpoint import CheckpointStore
from model_core.training.distributed import ALONE, Ranks
from model_core.workspace import InputFolder


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """One attempt at one step.

    `output` is an empty folder for the result's files, whose bytes must depend on the recipe and the inputs alone, since
    keys of later steps are made of them. `scratch` is a local folder that outlives a crash; `checkpoints` outlive the machine.
    """

    recipe: Recipe
    site: Site
    stage: str | None
    run: str
    key: str
    inputs: Mapping[str, InputFolder]
    output: Path
    scratch: Path
    checkpoints: CheckpointStore
    tracker: Tracker
    progress: Progress
    ranks: Ranks = ALONE
    loader_workers: int = 0

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Numbers at a step, told once however many ranks there are."""
        if self.ranks.is_first:
            self.tracker.metrics(values, step=step)

    def show(self, done: int, total: int, message: str = "") -> None:
        """Progress, shown once however many ranks there are."""
        if self.ranks.is_first:
            self.progress.update(done, total, message)

    def say(self, line: str) -> None:
        """One line, said once however many ranks there are."""
        if self.ranks.is_first:
            self.progress.say(line)
