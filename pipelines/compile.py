"""The DAG as Kubeflow's intermediate representation (IR): a YAML file that any Kubeflow Pipelines takes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kfp import compiler

from pipelines.training import Sections, training_pipeline


def compile_training(stages: Sequence[str], sections: Sections, *, image: str, output: Path) -> None:
    """Writes the IR of the training DAG to `output`, whole or not at all.

    The bytes depend on the stages, on which optional sections the recipe has, on the image and the versions of this package and kfp alone.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        draft = Path(folder, "pipeline.yaml")
        compiler.Compiler().compile(training_pipeline(stages, sections, image=image), str(draft))
        os.replace(draft, output)
