"""PSNR and SSIM against closed forms and scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model_core.data.pixels import image_bytes
from model_core.evaluation.reconstruction import psnr, ssim


def noisy_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(3, 3, 5, 6, generator=generator) * 2 - 1, size=(40, 33), mode="bilinear")
    noise = torch.randn(smooth.shape, generator=generator)
    return smooth + noise * torch.tensor([0.02, 0.1, 0.6])[:, None, None, None], smooth


def as_arrays(images: torch.Tensor) -> np.ndarray:
    return image_bytes(images).permute(0, 2, 3, 1).numpy()


def test_psnr_of_a_constant_error_has_its_closed_form() -> None:
    original = torch.full((2, 3, 16, 16), -1.0)
    reconstruction = original + torch.tensor([10.0, 51.0])[:, None, None, None] * 2 / 255
    expected = [20 * np.log10(255 / 10), 20 * np.log10(255 / 51)]
    np.testing.assert_allclose(psnr(reconstruction, original).numpy(), expected, rtol=1e-9)


def test_values_outside_the_range_are_clamped_and_fractions_rounded() -> None:
    original = torch.ones(1, 3, 16, 16)
    assert psnr(original + 5.0, original).item() == 100.0
    assert psnr(original - 0.4 * 2 / 255, original).item() == 100.0


def test_psnr_agrees_with_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    noisy, smooth = noisy_pairs()
    expected = [metrics.peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(as_arrays(smooth), as_arrays(noisy), strict=True)]
    np.testing.assert_allclose(psnr(noisy, smooth).numpy(), expected, rtol=1e-9)


def test_ssim_agrees_with_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    noisy, smooth = noisy_pairs()
    expected = [
        metrics.structural_similarity(
            a / 255, b / 255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=2
        )
        for a, b in zip(as_arrays(smooth), as_arrays(noisy), strict=True)
    ]
    np.testing.assert_allclose(ssim(noisy, smooth).numpy(), expected, atol=1e-9)


def test_ssim_agrees_with_a_brute_force_over_windows() -> None:
    """Wang et al. 2004, equation 13, on one channel of bytes scaled to 0..1."""
    noisy, smooth = noisy_pairs()
    a, b = (as_arrays(images)[1, :14, :13].astype(float) / 255 for images in (noisy, smooth))
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    scores = []
    for row, column, channel in np.ndindex(4, 3, 3):
        x, y = (image[row : row + 11, column : column + 11, channel] for image in (a, b))
        mean_x, mean_y = (window * x).sum(), (window * y).sum()
        spread_x, spread_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
        joint = (window * (x - mean_x) * (y - mean_y)).sum()
        scores.append(
            (2 * mean_x * mean_y + 0.01**2) * (2 * joint + 0.03**2) / ((mean_x**2 + mean_y**2 + 0.01**2) * (spread_x + spread_y + 0.03**2))
        )
    found = ssim(noisy[1:2, :, :14, :13], smooth[1:2, :, :14, :13]).item()
    assert found == pytest.approx(np.mean(scores), abs=1e-9)


def test_equal_pictures_score_best() -> None:
    _, smooth = noisy_pairs()
    assert torch.equal(psnr(smooth, smooth), torch.full((3,), 100.0, dtype=torch.float64))
    torch.testing.assert_close(ssim(smooth, smooth), torch.ones(3, dtype=torch.float64))


def test_ssim_refuses_pictures_below_its_window() -> None:
    with pytest.raises(ValueError, match=r"8 x 16 px.*11"):
        ssim(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))
