"""LPIPS against a brute force in numpy, on a narrow VGG16 with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model_core.documents import UserError
from model_core.models.lpips import LPIPS, load_lpips

CONVOLUTIONS = {0: (3, 2), 2: (2, 3), 5: (3, 2), 7: (2, 4), 10: (4, 3), 12: (3, 3), 14: (3, 4)}
CONVOLUTIONS |= {17: (4, 3), 19: (3, 2), 21: (2, 5), 24: (5, 3), 26: (3, 2), 28: (2, 4)}
WIDTHS = (3, 4, 4, 5, 4)  # after the last convolution of each block


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    result = {}
    for index, (inputs, outputs) in CONVOLUTIONS.items():
        result[f"features.{index}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
        result[f"features.{index}.bias"] = 0.3 * torch.rand(outputs, generator=generator)
    for number, width in enumerate(WIDTHS):
        result[f"lin{number}.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    return result


def pictures(seed: int) -> Tensor:
    return torch.rand(2, 3, 32, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def brute_force(one: np.ndarray, other: np.ndarray) -> float:
    """Zhang et al. 2018, equation 1, of two pictures (3, H, W), place by place."""
    values = {name: value.double().numpy() for name, value in weights().items()}

    def features(picture: np.ndarray) -> list[np.ndarray]:
        x = (picture - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array([0.458, 0.448, 0.450])[:, None, None]
        taps = []
        for index in range(30):  # torchvision's vgg16().features: convolutions, ReLUs, and pools at 4, 9, 16 and 23
            if index in CONVOLUTIONS:
                padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
                windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
                x = np.einsum("ihwkl,oikl->ohw", windows, values[f"features.{index}.weight"])
                x = x + values[f"features.{index}.bias"][:, None, None]
            elif index in (4, 9, 16, 23):
                x = x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2).max(axis=(2, 4))
            else:
                x = np.maximum(x, 0)
            if index in (3, 8, 15, 22, 29):
                taps.append(x)
        return taps

    total = 0.0
    for number, (a, b) in enumerate(zip(features(one), features(other), strict=True)):
        places = []
        for row, column in np.ndindex(a.shape[1:]):
            u, v = (x[:, row, column] / (np.linalg.norm(x[:, row, column]) + 1e-10) for x in (a, b))
            places.append(float(values[f"lin{number}.weight"][0, :, 0, 0] @ (u - v) ** 2))
        total += float(np.mean(places))
    return total


def test_distances_are_those_of_a_brute_force(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "lpips.safetensors")
    lpips, one, other = load_lpips(tmp_path / "lpips.safetensors"), pictures(1), pictures(2)
    expected = [brute_force(a.double().numpy(), b.double().numpy()) for a, b in zip(one, other, strict=True)]
    assert min(expected) > 0.01
    np.testing.assert_allclose(lpips(one, other).numpy(), expected, rtol=1e-4)


def test_equal_pictures_have_no_distance_and_all_gradients_are_finite() -> None:
    lpips = LPIPS({name: -value.abs() if name == "features.0.bias" else value for name, value in weights().items()})
    image = pictures(1).requires_grad_()
    assert not lpips(image, image.detach()).any()
    flat = torch.zeros(1, 3, 16, 16, requires_grad=True)
    lpips(flat, pictures(2)[:1, :, :16]).sum().backward()
    assert flat.grad is not None
    assert bool(flat.grad.isfinite().all())


def test_nothing_in_it_is_trained() -> None:
    assert not list(LPIPS(weights()).parameters())


def test_pictures_that_four_poolings_leave_nothing_of_are_refused() -> None:
    with pytest.raises(ValueError, match=r"8 x 16 px.*16"):
        LPIPS(weights())(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features.10.bias": None}, "lacks features.10.bias"),
        ({"lin4.weight": None}, "lacks lin4.weight"),
        ({"features.2.weight": torch.zeros(3, 3, 3, 3)}, r"features.2.weight of shape \(3, 3, 3, 3\); allowed is \(3, 2, 3, 3\)"),
        ({"lin1.weight": torch.full((1, 4, 1, 1), -1.0)}, "negative number in lin1.weight"),
    ],
)
def test_a_file_without_lpips_is_refused_by_name(change: dict[str, Tensor | None], words: str, tmp_path: Path) -> None:
    save_file({name: value for name, value in (weights() | change).items() if value is not None}, tmp_path / "lpips.safetensors")
    with pytest.raises(UserError, match=words):
        load_lpips(tmp_path / "lpips.safetensors")


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lpips.safetensors").write_text("words")
    for name in ("lpips.safetensors", "nowhere.safetensors"):
        with pytest.raises(UserError, match=f"{name} cannot be read as safetensors"):
            load_lpips(tmp_path / name)
