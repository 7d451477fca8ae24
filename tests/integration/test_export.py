"""What the whole line has trained runs in diffusers: its transformer, exported, gives the same latents there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model_core.sampling.published import find_published
from model_core.site import Site
from tests.diffusers_oracle import latents_of, public_latents
from tests.integration.conftest import Darkroom

PROMPTS = ["a red circle on the left with the text A7", "a blue square on the right"]


@pytest.mark.parametrize("num_images", [0, 1])
def test_a_trained_model_gives_the_same_latents_in_diffusers(
    darkroom: Darkroom, first: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_images: int
) -> None:
    told = json.loads(darkroom("export", first["run"], str(tmp_path / "model"), "--json"))
    assert "transformer" in told["parts"]
    assert "vae" in told["left_out"]  # cosines and folded pixels, which diffusers has no module for
    model = find_published(Site(workspace=str(darkroom.workspace)), first["run"]).load()
    model = replace(model, sampling=model.sampling.model_copy(update={"rescale_norm": False}))  # which diffusers does not do
    generator = torch.Generator().manual_seed(0)
    references = [torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1 for _ in range(num_images)]
    request: dict[str, Any] = {"prompts": PROMPTS, "size_px": (64, 64)}
    noise, found = latents_of(monkeypatch, model, references, **request)
    assert (found - noise).abs().mean() > 0.1
    assert (found - public_latents(tmp_path / "model", model, noise, references, **request)).abs().max() <= 1e-4
