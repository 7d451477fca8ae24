"""The DAG as Kubeflow's intermediate representation (IR): a YAML file that any Kubeflow Pipelines takes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kfp import compiler

from pipelines.training import training_pipeline


def compile_training(stages: Sequence[str], *, align: bool, image: str, output: Path) -> None:
    """Writes the IR of the training DAG to `output`, whole or not at all.

    The bytes depend on the stages, on whether the model is aligned, on the image and the versions of this package and kfp alone.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        draft = Path(folder, "pipeline.yaml")
        compiler.Compiler().compile(training_pipeline(stages, align=align, image=image), str(draft))
        os.replace(draft, output)
