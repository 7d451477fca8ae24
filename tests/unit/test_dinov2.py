"""A layer of DINOv2 as a teacher: the states that transformers gives, on the latent's grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from model_core.documents import UserError
from model_core.models.dinov2 import load_dinov2

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 28, "patch_size": 14}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SIZES)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("layer", [1, 2])
def test_features_are_the_states_of_the_layer_on_the_latents_grid(folder: Path, layer: int) -> None:
    teacher = load_dinov2(folder, layer=layer)
    pictures = np.random.default_rng(0).integers(256, size=(2, 3, 4, 3), dtype=np.uint8)
    # Blown up, so that resizing is smooth and Pillow's, which rounds to bytes, agrees.
    images = [Image.fromarray(picture).resize((48, 32), Image.Resampling.BICUBIC) for picture in pictures]
    tensor = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1 for image in images])
    features = teacher(tensor)
    assert features.shape == (2, teacher.dim, 2, 3)

    small = np.stack([np.array(image.resize((42, 28), Image.Resampling.BICUBIC)) for image in images]) / 255
    pixels = (small - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    model = Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model(torch.from_numpy(pixels).float().permute(0, 3, 1, 2), output_hidden_states=True).hidden_states[layer]
    expected = states[:, 1:].reshape(2, 2, 3, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(features, expected, atol=0.02, rtol=0)
    assert expected.std() > 0.2


def test_nothing_in_it_is_trained(folder: Path) -> None:
    assert not any(parameter.requires_grad for parameter in load_dinov2(folder, layer=2).parameters())


def test_layers_that_are_not_there_and_folders_without_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found 4; .* has layers 1 to 3"):
        load_dinov2(folder, layer=4)
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_dinov2(tmp_path / "nowhere", layer=1)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded as DINOv2"):
        load_dinov2(folder, layer=1)
