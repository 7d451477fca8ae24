"""The autoencoder: published sizes, shortcuts with their closed forms, latents' statistics, and its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from model_core.models.layers import ChannelRMSNorm, cosine_basis, fold, group_mean, repeat_channels, shortcut_down, shortcut_up, unfold
from model_core.models.vae import ResidualVAE, load_vae, save_vae
from model_core.recipe import VAEModel

TINY = {"stem_fold": 4, "encoder_widths": [8, 16, 16], "decoder_widths": [16, 16, 8], "encoder_blocks": 1, "decoder_blocks": 1}


def tiny(**fields: object) -> ResidualVAE:
    torch.manual_seed(0)
    return ResidualVAE(VAEModel.model_validate(TINY | fields))


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def parameters_in_millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def test_published_widths_have_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        vae = ResidualVAE(VAEModel())
    assert parameters_in_millions(vae.encoder) == pytest.approx(78.7, rel=0.01)
    assert parameters_in_millions(vae.decoder) == pytest.approx(259.05, rel=0.01)


@pytest.mark.parametrize("shortcut", ["none", "local", "global", "cosine"])
@pytest.mark.parametrize("stem_fold", [1, 2, 4, 8, 16])
def test_sixteen_times_smaller_sides_and_64_channels(shortcut: str, stem_fold: int) -> None:
    levels = {1: 5, 2: 4, 4: 3, 8: 2, 16: 1}[stem_fold]
    vae = tiny(shortcut=shortcut, stem_fold=stem_fold, encoder_widths=[8] * levels, decoder_widths=[64] + [16] * (levels - 1))
    images = pictures(2, 3, 48, 32)
    latents = vae.encode(images)
    assert latents.shape == (2, 64, 3, 2)
    assert vae.decode(latents).shape == images.shape


def test_published_widths_allow_every_shortcut() -> None:
    for shortcut in ("none", "local", "global", "cosine"):
        with torch.device("meta"):
            ResidualVAE(VAEModel(shortcut=shortcut))


def test_fold_is_undone_by_unfold_and_keeps_a_patch_together() -> None:
    images = pictures(1, 3, 8, 8)
    folded = fold(images, 4)
    assert torch.equal(folded[0, :, 1, 0], images[0, :, 4:8, 0:4].flatten())
    assert torch.equal(unfold(folded, 4), images)


def test_group_mean_undoes_repeat_channels() -> None:
    x = pictures(2, 4, 3, 3)
    torch.testing.assert_close(group_mean(repeat_channels(x, 12), 4), x)
    assert torch.equal(repeat_channels(x, 12)[:, 3:6], x[:, 1:2].expand(-1, 3, -1, -1))


def test_global_shortcut_alone_gives_the_group_means_of_each_patch() -> None:
    vae, images = tiny(shortcut="global"), pictures(1, 3, 16, 16)
    patch = images[0].flatten().numpy()
    means = patch.reshape(64, 12).mean(axis=1)
    np.testing.assert_allclose(vae.encode(images)[0, :, 0, 0].detach().numpy(), means, atol=1e-6)
    np.testing.assert_allclose(vae(images)[0].flatten().detach().numpy(), np.repeat(means, 12), atol=1e-6)


def test_cosine_basis_is_orthonormal_and_matches_scipy() -> None:
    fft = pytest.importorskip("scipy.fft")
    basis, frequency = cosine_basis(64, 16)
    flat = basis.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(64), atol=1e-5, rtol=0)
    transformed = np.stack([fft.dctn(pattern.numpy().sum(axis=0), norm="ortho") for pattern in basis[:46]])
    for pattern, coefficients in zip(frequency[:46].tolist(), transformed, strict=True):
        row, column = np.unravel_index(np.abs(coefficients).argmax(), (16, 16))
        assert coefficients[row, column] == pytest.approx(np.sqrt(3.0), abs=1e-5)
        assert pattern == pytest.approx(np.hypot(row, column))


def test_cosine_shortcut_alone_gives_back_what_lies_in_its_basis() -> None:
    vae = tiny(shortcut="cosine")
    basis, _ = cosine_basis(64, 16)
    images = torch.einsum("bk,kchw->bchw", torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), basis)
    torch.testing.assert_close(vae(images), images, atol=1e-5, rtol=0)
    flat = torch.full((1, 3, 16, 16), 0.5)
    torch.testing.assert_close(vae(flat), flat, atol=1e-5, rtol=0)


def test_a_trunk_trains_although_the_shortcut_rules_at_first() -> None:
    vae, images = tiny(shortcut="global"), pictures(2, 3, 32, 32)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = (vae(images) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in vae.parameters())


def test_channel_norm_matches_its_formula() -> None:
    norm, x = ChannelRMSNorm(6, eps=1e-6), pictures(2, 6, 3, 4)
    with torch.no_grad():
        norm.gamma.copy_(torch.arange(6.0))
    expected = torch.nn.functional.normalize(x, dim=1) * 6**0.5 * torch.arange(6.0)[:, None, None]
    torch.testing.assert_close(norm(x), expected, atol=1e-4, rtol=1e-4)


def test_attention_makes_a_latent_depend_on_the_whole_picture() -> None:
    torch.manual_seed(0)
    images = pictures(1, 3, 160, 160)
    changed = images.clone()
    changed[..., :16, :16] = -1.0
    for attention in (True, False):
        vae = tiny(shortcut="none", mid_attention=attention)
        for parameter in vae.parameters():
            nn.init.normal_(parameter, std=0.2)
        far = (vae.encode(images) - vae.encode(changed))[0, :, -1, -1]
        assert bool(far.any()) is attention


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({"shortcut": "local", "encoder_widths": [8, 24, 100]}, ("32", "24")),
        ({"shortcut": "local", "decoder_widths": [16, 6, 6]}, ("24", "16")),
        ({"shortcut": "global", "latent_channels": 50}, ("768", "50")),
    ],
)
def test_shortcuts_without_whole_groups_are_refused_with_both_numbers(fields: dict[str, object], numbers: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{numbers[0]}.*{numbers[1]}"):
        tiny(**fields)


def test_pictures_and_latents_of_a_wrong_shape_are_refused() -> None:
    vae = tiny()
    with pytest.raises(ValueError, match=r"40.*16"):
        vae.encode(torch.zeros(1, 3, 40, 32))
    with pytest.raises(ValueError, match=r"32.*64"):
        vae.decode(torch.zeros(1, 32, 2, 2))


def test_standardise_is_undone_by_unstandardise() -> None:
    vae, latents = tiny(), pictures(2, 64, 2, 2)
    vae.latent_mean += 3.0
    vae.latent_std *= 2.0
    torch.testing.assert_close(vae.standardise(latents), (latents - 3.0) / 2.0)
    torch.testing.assert_close(vae.unstandardise(vae.standardise(latents)), latents)


def test_saved_model_loads_with_the_same_weights_and_statistics(tmp_path: Path) -> None:
    vae, images = tiny(shortcut="cosine"), pictures(1, 3, 32, 32)
    vae.latent_mean += 1.5
    save_vae(vae, tmp_path)
    loaded = load_vae(tmp_path)
    assert torch.equal(loaded(images), vae(images))
    assert torch.equal(loaded.latent_mean, vae.latent_mean)
    assert loaded.config == vae.config
    assert set(load_file(tmp_path / "model.safetensors")) == set(vae.state_dict())


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_vae(tiny(), tmp_path / name)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_two_frames_average_to_nothing_in_even_channels_and_to_the_mean_of_each_patch_in_odd_ones() -> None:
    x = pictures(1, 3, 4, 6)
    down = shortcut_down(x, 6, factor=2, temporal=True)
    assert not down[:, ::2].any()
    torch.testing.assert_close(down[:, 1::2], torch.nn.functional.avg_pool2d(x, 2))
    up = shortcut_up(x.repeat_interleave(2, dim=1), 3, temporal=True)
    torch.testing.assert_close(up, torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def test_without_attention_and_mixers_the_parameters_are_those_of_r2s_suite() -> None:
    with torch.device("meta"):
        vae = ResidualVAE(VAEModel(mid_attention=False, mixers=False))
    assert parameters_in_millions(vae.encoder) == pytest.approx(76, rel=0.015)
    assert parameters_in_millions(vae.decoder) == pytest.approx(248, rel=0.01)
