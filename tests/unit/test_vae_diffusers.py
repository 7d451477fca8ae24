"""The autoencoder against diffusers' module on random small configurations, and the way there and back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model_core.documents import UserError
from model_core.models.vae import ResidualVAE
from model_core.models.vae_diffusers import from_diffusers, is_diffusers, read_diffusers, to_diffusers, write_diffusers
from model_core.recipe import VAEModel
from tests.published_models import PUBLIC_VAE, VAE

diffusers = pytest.importorskip("diffusers")


def random_settings(seed: int) -> dict[str, Any]:
    """A configuration of theirs whose shortcuts have whole groups."""
    draw = random.Random(seed)
    patch = draw.choice([None, None, 2])
    multipliers = draw.choice([[1, 2, 4, 8, 8], [1, 1, 2, 2, 2], [1, 2, 2, 2, 2], [1, 1, 1, 1, 1]])[: 5 if patch is None else 4]
    # Without growth at the end, as theirs has it: the last level's shortcut has nothing to fold.
    multipliers[-1] = multipliers[-2]
    channels = draw.choice([3, 4]) * (patch or 1) ** 2
    latent = draw.choice([2, 5, 8])
    return {
        "base_dim": draw.choice([6, 8]),
        "decoder_base_dim": draw.choice([8, 10, None]),
        "z_dim": latent,
        "dim_mult": multipliers,
        "num_res_blocks": draw.choice([1, 2]),
        "temperal_downsample": [draw.random() < 0.5 for _ in multipliers[1:]],
        "latents_mean": [draw.uniform(-3, 3) for _ in range(latent)],
        "latents_std": [draw.uniform(1, 5) for _ in range(latent)],
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": patch,
    }


def their_module(settings: dict[str, Any], seed: int) -> nn.Module:
    """Theirs with weights that keep values near one, so that differences mean something."""
    torch.manual_seed(seed)
    module = diffusers.AutoencoderKLQwenImage21(**settings)
    for name, parameter in module.named_parameters():
        if name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.7, 1.3)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        else:
            nn.init.normal_(parameter, std=0.7 * parameter[0].numel() ** -0.5)
    nn.init.normal_(module.decoder.conv_out.weight, std=0.1 * module.decoder.conv_out.weight[0].numel() ** -0.5)  # within the clamp
    return module.eval()


@pytest.mark.parametrize("seed", range(10))
def test_encode_decode_and_gradients_are_those_of_diffusers(seed: int) -> None:
    settings = random_settings(seed)
    theirs = their_module(settings, seed)
    ours = from_diffusers(dict(theirs.config), theirs.state_dict())
    draw = random.Random(seed)
    shape = (draw.choice([1, 2]), ours.config.pixel_channels, *draw.choice([(16, 32), (32, 16), (16, 16)]))
    images = (torch.rand(shape) * 2 - 1).requires_grad_()
    their_images = images.detach().clone().requires_grad_()

    latents, their_latents = ours.encode(images), theirs.encode(their_images[:, :, None]).latent_dist.mode()
    decoded, their_decoded = ours.decode(latents), theirs.decode(their_latents).sample
    assert their_decoded.abs().max() < 1
    assert close(latents, their_latents[:, :, 0])
    assert close(decoded, their_decoded[:, :, 0])

    pull = 0.1 * torch.randn(decoded.shape) / decoded.numel() ** 0.5  # gradients of order one and less
    (decoded * pull).sum().backward()
    (their_decoded[:, :, 0] * pull).sum().backward()
    assert close(images.grad, their_images.grad)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert sum(value is not None for value in expected.values()) > 30
    gradients = to_diffusers(with_gradients_as_weights(ours))[1]
    folded = {"encoder.conv_out.weight", "encoder.conv_out.bias", "quant_conv.weight", "quant_conv.bias"}
    for name in gradients.keys() - folded:
        assert ".time_conv." in name or close(gradients[name], expected[name]), name

    # What was folded into one convolution: the chain rule gives the gradients of both.
    latent = ours.config.latent_channels
    weight, bias = ours.encoder.conv_out.weight.grad, ours.encoder.conv_out.bias.grad
    conv, quant = theirs.encoder.conv_out, theirs.quant_conv.weight.detach()[:latent, :, 0, 0]
    assert close(torch.einsum("om,oikl->mikl", quant, weight), expected["encoder.conv_out.weight"])
    assert close(quant.T @ bias, expected["encoder.conv_out.bias"])
    mixed = torch.einsum("oikl,mikl->om", weight, conv.weight.detach()) + torch.outer(bias, conv.bias.detach())
    assert close(mixed, expected["quant_conv.weight"][:latent, :, 0, 0])
    assert close(bias, expected["quant_conv.bias"][:latent])


def close(ours: Tensor | None, theirs: Tensor | None) -> bool:
    """Within 1e-5, and within a thousandth of the largest value, so that small gradients are told apart too."""
    assert ours is not None
    assert theirs is not None
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item() <= min(1e-5, 1e-3 * theirs.abs().max().item())


def with_gradients_as_weights(vae: ResidualVAE) -> ResidualVAE:
    copy = ResidualVAE(vae.config)
    copy.load_state_dict(vae.state_dict() | {name: parameter.grad for name, parameter in vae.named_parameters()})
    return copy


def drawn(**fields: object) -> ResidualVAE:
    torch.manual_seed(0)
    vae = ResidualVAE(VAEModel.model_validate(VAE | fields))
    for value in vae.state_dict().values():
        value.copy_(torch.rand(value.shape) + 0.5)
    return vae


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temporal_folds": []},
        {"stem_fold": 2, "encoder_widths": [4, 8, 8, 8], "decoder_widths": [8, 8, 8, 4], "temporal_folds": [True, False, True]},
    ],
)
def test_there_and_back_is_bitwise(fields: dict[str, Any], tmp_path: Path) -> None:
    vae = drawn(**fields)
    write_diffusers(vae, tmp_path)
    back = read_diffusers(tmp_path)
    assert back.config == vae.config
    assert list(back.state_dict()) == list(vae.state_dict())
    assert all(torch.equal(back.state_dict()[name], value) for name, value in vae.state_dict().items())
    images = torch.rand(1, 4, 32, 16) * 2 - 1
    assert torch.equal(back(images), vae.eval()(images))
    config, state = to_diffusers(back)
    first = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert state.keys() == first.keys()
    assert all(torch.equal(state[name], value) for name, value in first.items())
    assert config == json.loads((tmp_path / "config.json").read_text())


def test_diffusers_opens_what_was_written_and_decodes_alike(tmp_path: Path) -> None:
    vae = drawn(post_quant_conv=False)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(0.02)
    write_diffusers(vae, tmp_path)
    theirs = diffusers.AutoencoderKLQwenImage21.from_pretrained(tmp_path, local_files_only=True)
    images = torch.rand(1, 4, 16, 32) * 2 - 1
    with torch.inference_mode():
        posterior = theirs.encode(images[:, :, None]).latent_dist
        latents = vae.encode(images)
        torch.testing.assert_close(latents, posterior.mode()[:, :, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(vae.decode(latents).clamp(-1, 1), theirs.decode(latents[:, :, None]).sample[:, :, 0], atol=1e-5, rtol=0)
    assert posterior.std.max() < 1e-6
    assert theirs.config.latents_mean == vae.latent_mean.tolist()


def test_weights_in_shards_are_read_whole(tmp_path: Path) -> None:
    vae = drawn()
    write_diffusers(vae, tmp_path)
    whole = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    files = {name: f"diffusion_pytorch_model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(whole)}
    for file in set(files.values()):
        save_file({name: value for name, value in whole.items() if files[name] == file}, tmp_path / file)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in read_diffusers(tmp_path).state_dict().items())


def test_the_public_configuration_has_their_parameters_but_for_the_idle_ones() -> None:
    with torch.device("meta"):
        theirs, ours = diffusers.AutoencoderKLQwenImage21(), ResidualVAE(VAEModel.model_validate(PUBLIC_VAE))
    sizes = {name: value.numel() for name, value in theirs.named_parameters()}
    idle = sum(size for name, size in sizes.items() if "time_conv" in name or name.startswith("quant_conv."))
    idle += sum(size for name, size in sizes.items() if name.startswith("encoder.conv_out.")) // 2
    assert sum(value.numel() for value in ours.parameters()) == sum(sizes.values()) - idle
    assert sum(sizes.values()) / 1e6 == pytest.approx(78.7 + 259.05, rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shortcut": "global", "temporal_folds": []}, "shortcut global"),
        ({"mixers": True}, "mixers true"),
        ({"mid_attention": False}, "mid_attention false"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-06"),
        ({"decoder_blocks": 1}, "decoder_blocks 1"),
        ({"encoder_widths": [8, 4, 4, 4, 4]}, "encoder_widths"),
        ({"decoder_widths": [16, 16, 8, 4, 4]}, "decoder_widths"),
    ],
)
def test_a_model_that_they_cannot_represent_is_refused(fields: dict[str, Any], words: str) -> None:
    with torch.device("meta"):
        vae = ResidualVAE(VAEModel.model_validate(VAE | fields))
    with pytest.raises(UserError, match=words):
        to_diffusers(vae)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"z_dim": None}, "lacks z_dim"),
        ({"is_residual": False}, "is_residual False"),
        ({"dim_mult": [2, 2, 2, 2, 2]}, "dim_mult"),
        ({"dropout": 0.1}, "dropout 0.1"),
        ({"out_channels": 3}, "out_channels 3"),
        ({"in_channels": 5, "out_channels": 5}, "in_channels 5"),
        ({"dim_mult": [1, 2, 2, 2]}, "scale_factor_spatial"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"latents_std": [0.0] * 4}, "latents_std"),
    ],
)
def test_a_configuration_without_counterpart_is_refused(fields: dict[str, Any], words: str) -> None:
    config, state = to_diffusers(drawn())
    with pytest.raises(UserError, match=words):
        from_diffusers({name: value for name, value in (config | fields).items() if value is not None or name == "patch_size"}, state)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    config, state = to_diffusers(drawn())
    missing = {name: value for name, value in state.items() if name != "decoder.conv_in.bias"}
    with pytest.raises(UserError, match=r"lack decoder\.conv_in\.bias"):
        from_diffusers(config, missing)
    with pytest.raises(UserError, match=r"unknown decoder\.more"):
        from_diffusers(config, state | {"decoder.more": torch.zeros(1)})
    with pytest.raises(UserError, match=r"decoder\.conv_in\.bias has shape \(3,\)"):
        from_diffusers(config, state | {"decoder.conv_in.bias": torch.zeros(3)})
    with pytest.raises(UserError, match="cannot be read"):
        read_diffusers(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="AutoencoderKL'"):
        read_diffusers(tmp_path)
    assert not is_diffusers(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        is_diffusers(tmp_path)
