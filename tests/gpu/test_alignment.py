"""Reinforcement learning on a GPU: the step from its inputs to what it publishes, with bf16 passes and fp32 trajectories."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model_core.recipe import GuidanceMode
from model_core.steps import align_grpo
from tests.alignment_parts import Scores, context_of, document, write_alignment_inputs


@pytest.mark.parametrize("mode", list(GuidanceMode))
def test_every_mode_begins_at_a_ratio_of_one_and_publishes_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: GuidanceMode
) -> None:
    monkeypatch.setattr(align_grpo, "open_scorer", lambda *_args, **_kwargs: Scores())
    (tmp_path / "inputs").mkdir()
    inputs = write_alignment_inputs(tmp_path / "inputs")
    context = context_of(tmp_path, inputs, updates=2, guidance_mode=mode, kl_weight=0.1)
    align_grpo.run(context)
    assert [point["ratio"] for point in document(context).points] == [1.0, 1.0]
    before = load_file(inputs["model"].folder("mmdit") / "model.safetensors")
    after = load_file(context.output / "mmdit/model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
