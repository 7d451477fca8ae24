"""VAE: sizes, shortcuts, losses and metrics against closed forms and scikit-image."""

import numpy as np
import pytest
import torch
from model_core.data.pixels import image_bytes, image_tensor, tensor_image
from model_core.evaluation.reconstruction import psnr, ssim
from model_core.models.vae import ResidualVAE, dct_basis, load_vae, save_vae
from model_core.objectives.autoencoding import alignment_loss, edge_loss, gradient_features, relaxed
from model_core.recipe import VAEModel

TINY = VAEModel(stem_fold=4, encoder_widths=[8, 16, 16], decoder_widths=[16, 16, 8], encoder_blocks=1, decoder_blocks=1)


def test_the_default_configuration_has_the_published_trunk():
    with torch.device("meta"):
        vae = ResidualVAE(VAEModel(shortcut="local"))
    counts = [sum(parameter.numel() for parameter in part.parameters()) / 1e6 for part in (vae.encoder, vae.decoder)]
    # The published 78.7 M and 259.0 M hold idle temporal convolutions (0.78, 5.98) and a log-variance head (0.44).
    assert counts == pytest.approx([77.46, 253.07], abs=0.05)


@pytest.mark.parametrize("shortcut", ["none", "local", "global"])
def test_a_picture_becomes_64_channels_at_a_sixteenth_of_its_sides_and_comes_back(shortcut):
    vae = ResidualVAE(TINY.model_copy(update={"shortcut": shortcut}))
    latents = vae.encode(torch.rand(2, 3, 32, 48))
    assert latents.shape == (2, 64, 2, 3)
    assert vae.decode(latents).shape == (2, 3, 32, 48)


def test_at_first_the_global_shortcut_is_an_orthonormal_projection():
    basis = dct_basis(64)
    assert torch.allclose(basis @ basis.T, torch.eye(64), atol=1e-5)
    vae = ResidualVAE(TINY)
    flat = torch.full((1, 3, 32, 32), 0.3)
    assert torch.allclose(vae.decode(vae.encode(flat)), flat, atol=1e-5)
    once = vae.decode(vae.encode(torch.rand(1, 3, 32, 32)))
    assert torch.allclose(vae.decode(vae.encode(once)), once, atol=1e-5)


def test_widths_that_a_local_shortcut_cannot_fold_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="32 folded channels onto 24"):
        ResidualVAE(TINY.model_copy(update={"shortcut": "local", "encoder_widths": [8, 24, 24]}))


def test_a_side_that_is_no_multiple_of_16_is_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        ResidualVAE(TINY).encode(torch.rand(1, 3, 40, 32))


def test_standardising_is_undone_and_saved_with_the_weights(tmp_path):
    vae = ResidualVAE(TINY)
    vae.latent_mean.normal_()
    vae.latent_std.uniform_(0.5, 2.0)
    save_vae(vae, tmp_path)
    loaded = load_vae(tmp_path)
    latents = torch.randn(2, 64, 2, 2)
    assert torch.allclose(loaded.unstandardise(vae.standardise(latents)), latents, atol=1e-5)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded.encode(images), vae.encode(images))


def test_psnr_is_that_of_its_definition_and_of_scikit_image():
    from skimage.metrics import peak_signal_noise_ratio

    generator = torch.Generator().manual_seed(0)
    images, targets = (torch.randint(0, 256, (3, 3, 24, 24), generator=generator, dtype=torch.uint8) for _ in range(2))
    expected = [peak_signal_noise_ratio(t.numpy(), i.numpy()) for i, t in zip(images, targets, strict=True)]
    assert psnr(images, targets).tolist() == pytest.approx(expected)
    assert psnr(torch.full((1, 3, 8, 8), 10, dtype=torch.uint8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).item() == pytest.approx(20 * np.log10(25.5))


def test_ssim_agrees_with_scikit_image():
    from skimage.metrics import structural_similarity

    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 256, (2, 3, 32, 40), generator=generator, dtype=torch.uint8)
    images = image_bytes(targets.float() / 127.5 - 1 + 0.1 * torch.randn(targets.shape, generator=generator))
    for image, target, score in zip(images, targets, ssim(images, targets), strict=True):
        _, full = structural_similarity(
            image.numpy() / 255, target.numpy() / 255, channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
        )
        assert score.item() == pytest.approx(full[:, 5:-5, 5:-5].mean(), abs=1e-6)


def test_pictures_survive_the_way_to_tensors_and_back():
    image = tensor_image(torch.rand(3, 5, 7) * 2 - 1)
    assert np.array_equal(np.asarray(tensor_image(image_tensor(image))), np.asarray(image))


def test_alignment_is_zero_at_the_teacher_two_or_more_against_it_and_forgives_up_to_its_margins():
    features = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    assert alignment_loss(2 * features, features, margin_cos=0.0, margin_dist=0.0).item() == pytest.approx(0, abs=1e-6)
    assert alignment_loss(-features, features, margin_cos=0.0, margin_dist=0.0).item() == pytest.approx(2, abs=1e-5)
    assert alignment_loss(-features, features, margin_cos=0.5, margin_dist=0.25).item() == pytest.approx(1.5, abs=1e-5)


def test_margins_relax_linearly():
    assert relaxed(0.0, strict=(0.0, 0.1), loose=(0.5, 0.3)) == (0.0, 0.1)
    assert relaxed(0.5, strict=(0.0, 0.1), loose=(0.5, 0.3)) == pytest.approx((0.25, 0.2))


def test_edge_loss_sees_what_a_constant_shift_does_not():
    images = torch.rand(1, 3, 8, 8)
    assert edge_loss(images + 0.2, images).item() == pytest.approx(0, abs=1e-6)
    step = torch.zeros(1, 3, 8, 8)
    step[..., 4:] = 1.0
    assert edge_loss(step, torch.zeros_like(step)).item() == pytest.approx(0.5 / 7)


def test_gradient_features_tell_the_direction_of_an_edge():
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    across, down = gradient_features(ramp, cell_px=16)[0, 6:14, 0, 0], gradient_features(ramp.mT, cell_px=16)[0, 6:14, 0, 0]
    assert across.argmax() == 0
    assert down.argmax() == 2
