"""Pictures through the autoencoder: those of one size together, in the order in which they were given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from model_core.evaluation import drawing
from model_core.evaluation.drawing import reconstruct
from model_core.models.vae import ResidualVAE
from model_core.recipe import VAEModel


def test_pictures_of_several_sizes_come_back_as_each_would_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = VAEModel(stem_fold=8, encoder_widths=[8, 8], decoder_widths=[8, 8], encoder_blocks=1, decoder_blocks=1)
    vae = ResidualVAE(config).eval()
    generator = np.random.default_rng(0)
    sizes = ((32, 32), (48, 32), (32, 32), (32, 48), (32, 32), (48, 32))
    pictures = [Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for height, width in sizes]
    monkeypatch.setattr(drawing, "BATCH_PIXELS", 2 * 32 * 32)  # three of one size are two batches
    together = reconstruct(vae, pictures)
    for picture, decoded in zip(pictures, together, strict=True):
        alone = reconstruct(vae, [picture])[0]
        assert decoded.size == picture.size
        assert np.abs(np.asarray(decoded, dtype=int) - np.asarray(alone, dtype=int)).max() <= 1
    assert reconstruct(vae, []) == []
