"""Losses of the autoencoder against closed forms and a brute force in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from model_core.models.teacher import OrientedEdges
from model_core.objectives.autoencoding import alignment_loss, edge_loss, l1_loss, margins_at, mse_loss, pair_places, value_at


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_reconstruction_losses_of_a_constant_error() -> None:
    target = normal(2, 3, 8, 8)
    prediction = target - 0.25
    assert l1_loss(prediction, target).item() == pytest.approx(0.25)
    assert mse_loss(prediction, target).item() == pytest.approx(0.0625)
    assert edge_loss(prediction, target).item() == pytest.approx(0.0, abs=1e-12)


def test_edge_loss_of_a_ramp_is_its_slope_across_and_down() -> None:
    ramp = 0.3 * torch.arange(8.0)[None, :] + 0.1 * torch.arange(8.0)[:, None]
    assert edge_loss(ramp.expand(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)).item() == pytest.approx(0.4, abs=1e-6)


@pytest.mark.parametrize("margins", [(0.0, 0.0), (0.5, 0.25), (0.1, 0.8)])
def test_alignment_matches_a_brute_force_over_places(margins: tuple[float, float]) -> None:
    z, f = normal(2, 5, 2, 3), normal(2, 5, 2, 3, seed=1)

    def cos(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    points, pairs = [], []
    for latents, features in zip(z.flatten(2).numpy(), f.flatten(2).numpy(), strict=True):
        for p in range(6):
            points.append(max(0.0, 1 - cos(latents[:, p], features[:, p]) - margins[0]))
            for q in range(6):
                difference = cos(latents[:, p], latents[:, q]) - cos(features[:, p], features[:, q])
                pairs.append(max(0.0, abs(difference) - margins[1]))
    assert alignment_loss(z, f, margins=margins).item() == pytest.approx(np.mean(points) + np.mean(pairs))


def test_alignment_with_the_features_themselves_is_zero_at_any_scale() -> None:
    features = normal(2, 5, 3, 3)
    assert alignment_loss(7.0 * features, features, margins=(0.0, 0.0)).item() == pytest.approx(0.0, abs=1e-12)


def test_alignment_of_opposite_latents_is_two() -> None:
    features = normal(1, 5, 3, 3)
    assert alignment_loss(-features, features, margins=(0.0, 0.0)).item() == pytest.approx(2.0)
    assert alignment_loss(-features, features, margins=(0.5, 0.25)).item() == pytest.approx(1.5)


def test_latents_within_the_margins_feel_no_pull() -> None:
    features = normal(1, 5, 3, 3)
    latents = (features + 0.01 * normal(1, 5, 3, 3, seed=1)).requires_grad_()
    alignment_loss(latents, features, margins=(0.5, 0.25)).backward()
    assert not latents.grad.any()


def test_alignment_refuses_unequal_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 2\).*\(1, 5, 2, 2\)"):
        alignment_loss(normal(1, 4, 2, 2), normal(1, 5, 2, 2), margins=(0.0, 0.0))


def test_pairs_of_some_places_have_the_expectation_of_all_pairs() -> None:
    """Over every choice of 3 of 6 places, the mean is the loss of all of them: the estimate is unbiased."""
    z, f = normal(2, 5, 2, 3), normal(2, 5, 2, 3, seed=1)
    margins = (0.5, 0.1)
    whole = alignment_loss(z, f, margins=margins).item()
    chosen = [alignment_loss(z, f, margins=margins, places=torch.tensor(places)).item() for places in itertools.combinations(range(6), 3)]
    assert np.std(chosen) > 1e-3
    assert np.mean(chosen) == pytest.approx(whole, rel=1e-12)
    assert alignment_loss(z, f, margins=margins, places=torch.arange(6)).item() == pytest.approx(whole, rel=1e-12)


def test_up_to_32_by_32_places_all_pairs_are_looked_at_and_above_as_many_by_key() -> None:
    assert pair_places(32 * 32, 0, "alignment", 7) is None
    places = pair_places(48 * 64, 0, "alignment", 7)
    assert places is not None
    assert len(set(places.tolist())) == 32 * 32
    assert 0 <= places.min() < places.max() < 48 * 64
    assert torch.equal(places, pair_places(48 * 64, 0, "alignment", 7))
    assert not torch.equal(places, pair_places(48 * 64, 0, "alignment", 8))


def test_a_weight_relaxes_in_a_line() -> None:
    np.testing.assert_allclose([value_at(step, steps=5, strict=0.5, relaxed=0.1) for step in range(5)], np.linspace(0.5, 0.1, 5))


def test_margins_go_from_strict_to_relaxed_in_a_line() -> None:
    schedule = [margins_at(step, steps=5, strict=(0.0, 0.1), relaxed=(0.4, 0.3)) for step in range(5)]
    np.testing.assert_allclose(schedule, np.linspace((0.0, 0.1), (0.4, 0.3), 5))
    assert margins_at(0, steps=1, strict=(0.0, 0.1), relaxed=(0.4, 0.3)) == (0.0, 0.1)


def test_teacher_sees_colour_and_the_direction_of_an_edge() -> None:
    teacher = OrientedEdges()
    picture = torch.zeros(1, 3, 32, 32)
    picture[:, 0] = 0.5
    flat = teacher(picture)
    assert flat.shape == (1, OrientedEdges.dim, 2, 2)
    np.testing.assert_allclose(flat[0, :3, 0, 0].numpy(), [0.5, 0.0, 0.0])
    assert not flat[0, 3:].any()
    picture[..., 24:] = 1.0
    across = teacher(picture)[0, 3:11, 0, 1]
    assert across.argmax().item() == 0
    assert across[4].item() == 0.0
    down = teacher(picture.transpose(2, 3))[0, 3:11, 1, 0]
    assert down.argmax().item() == 2


def test_teacher_has_nothing_to_train() -> None:
    assert not list(OrientedEdges().parameters())
