"""Few-step distillation on a GPU: the step from its inputs to the student, with bf16 passes and clean predictions in fp64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model_core.steps import distill_dmd
from tests.alignment_parts import context_of, write_alignment_inputs


@pytest.mark.parametrize("settings", [{}, {"offload": True}, {"lora_rank": 2}, {"guidance_times": [0.3, 0.98]}], ids=str)
def test_a_student_is_distilled_with_finite_weights_that_are_not_its_teachers(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "inputs").mkdir()
    inputs = write_alignment_inputs(tmp_path / "inputs")
    context = context_of(tmp_path, inputs, dmd=settings)
    distill_dmd.run(context)
    before = load_file(inputs["model"].folder("mmdit") / "model.safetensors")
    after = load_file(context.output / "mmdit/model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    points = json.loads((context.output / "distillation.json").read_text())["points"]
    assert len(points) == 6
    assert all(point["critic_loss"] > 0 for point in points)
