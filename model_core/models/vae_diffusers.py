"""The autoencoder as diffusers' `AutoencoderKLQwenImage21`, both ways, without diffusers: names, configuration and folder.

Their module is a video autoencoder of one frame. What a picture never reads has no place here: the temporal convolutions and the
log-variance half of the posterior. Written out, the former are zero and the latter is diffusers' least, e^-30, as this model
is deterministic. Their 1x1 convolution after the encoder is folded into the convolution before it, which is exact but for rounding.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_core.documents import UserError
from model_core.models.diffusers_folder import check_weights, class_name, read_folder, write_folder
from model_core.models.vae import ResidualVAE
from model_core.recipe import CompressionRatio, VAEModel

CLASS_NAME = "AutoencoderKLQwenImage21"
NORM_EPS = 1e-24  # they divide by the norm itself, which is kept above 1e-12
LEAST_LOG_VARIANCE = -30.0  # diffusers clamps there
STATISTICS = ("latent_mean", "latent_std")  # in their configuration, not in the state dict
READ = {  # fields of their configuration that must be there
    *("base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample"),
    *("latents_mean", "latents_std", "is_residual", "in_channels", "out_channels"),
}

# Ours to theirs, in this order.
RENAMES = (
    (r"^decoder\.post_quant\.", "post_quant_conv."),
    (r"^encoder\.levels\.(\d+)\.down\.conv\.", r"encoder.down_blocks.\1.downsampler.resample.1."),
    (r"^encoder\.levels\.(\d+)\.blocks\.", r"encoder.down_blocks.\1.resnets."),
    (r"^decoder\.levels\.(\d+)\.up\.conv\.", r"decoder.up_blocks.\1.upsampler.resample.1."),
    (r"^decoder\.levels\.(\d+)\.blocks\.", r"decoder.up_blocks.\1.resnets."),
    (r"\.mid\.0\.", ".mid_block.resnets.0."),
    (r"\.mid\.1\.norm\.", ".mid_block.attentions.0.norm."),
    (r"\.mid\.1\.qkv\.", ".mid_block.attentions.0.to_qkv."),
    (r"\.mid\.1\.out\.", ".mid_block.attentions.0.proj."),
    (r"\.mid\.2\.", ".mid_block.resnets.1."),
    (r"\.skip\.", ".conv_shortcut."),
)


def to_diffusers(vae: ResidualVAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Their configuration and state dict; raises UserError for a model that they cannot represent."""
    config = vae.config
    channels = config.pixel_channels * config.stem_fold**2
    settings = {
        "_class_name": CLASS_NAME,
        "base_dim": config.encoder_widths[0],
        "decoder_base_dim": config.decoder_widths[-1],
        "z_dim": config.latent_channels,
        "dim_mult": _multipliers(config),
        "num_res_blocks": config.encoder_blocks,
        "attn_scales": [],
        "temperal_downsample": config.temporal_folds or [False] * (len(config.encoder_widths) - 1),
        "dropout": 0.0,
        "latents_mean": vae.latent_mean.tolist(),
        "latents_std": vae.latent_std.tolist(),
        "is_residual": True,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": None if config.stem_fold == 1 else config.stem_fold,
        "scale_factor_temporal": 2 ** sum(config.temporal_folds),
        "scale_factor_spatial": CompressionRatio,
    }
    return settings, _their_state(vae)


def from_diffusers(config: dict[str, Any], state: dict[str, Tensor]) -> ResidualVAE:
    """The autoencoder of their configuration and state dict, in single precision and evaluation mode.

    Raises UserError for a configuration that this one cannot represent and for a state dict that does not fit it.
    """
    with torch.device("meta"):  # weights that come from elsewhere need no drawing
        vae = ResidualVAE(_our_config(config))
        expected = _their_state(vae)
    check_weights(
        *({name: value for name, value in each.items() if ".time_conv." not in name} for each in (state, expected)),
        what="VAE",
        name=CLASS_NAME,
    )
    theirs = {name: value.to(torch.float32, copy=True) for name, value in state.items()}
    fold, latent = vae.config.stem_fold, vae.config.latent_channels
    theirs |= _fold_quant_conv(theirs, latent)
    theirs["encoder.conv_in.weight"] = _swap_patch(theirs["encoder.conv_in.weight"], fold, dim=1)
    for part in ("weight", "bias"):
        theirs[f"decoder.conv_out.{part}"] = _swap_patch(theirs[f"decoder.conv_out.{part}"], fold, dim=0)
    ours = {name: theirs[_their_name(name)].reshape(value.shape) for name, value in vae.named_parameters()}
    for name in STATISTICS:
        ours[name] = torch.tensor(config[name.replace("latent_", "latents_")], dtype=torch.float32)
    vae.load_state_dict(ours, assign=True)
    return vae.to(memory_format=torch.channels_last).eval()


def write_diffusers(vae: ResidualVAE, folder: Path) -> None:
    """Writes the folder that diffusers' `from_pretrained` reads; raises UserError for a model that they cannot represent."""
    write_folder(folder, *to_diffusers(vae))


def is_diffusers(folder: Path) -> bool:
    """Whether a folder's `config.json` is of their autoencoder; raises UserError for one that is not JSON."""
    return class_name(folder, what="VAE") == CLASS_NAME


def read_diffusers(folder: Path) -> ResidualVAE:
    """The autoencoder in a folder of theirs, its weights whole or in shards; raises UserError when it is none."""
    return from_diffusers(*read_folder(folder, CLASS_NAME, what="VAE"))


def _their_state(vae: ResidualVAE) -> dict[str, Tensor]:
    """Their state dict, what a picture never reads included."""
    config, dtype = vae.config, vae.latent_mean.dtype
    latent, fold, last = config.latent_channels, config.stem_fold, len(config.encoder_widths) - 1
    state = {}
    for name, value in vae.state_dict().items():
        theirs = _their_name(name)
        # The attention's norm sees pictures, all others videos; each keeps that many axes of size one.
        axes = 2 if ".attentions." in theirs else 3
        if name not in STATISTICS:
            state[theirs] = value.reshape(-1, *[1] * axes) if theirs.endswith(".gamma") else value.contiguous()
    state["encoder.conv_in.weight"] = _swap_patch(state["encoder.conv_in.weight"], fold, dim=1)
    for part in ("weight", "bias"):
        state[f"decoder.conv_out.{part}"] = _swap_patch(state[f"decoder.conv_out.{part}"], fold, dim=0)
        mean = state[f"encoder.conv_out.{part}"]
        state[f"encoder.conv_out.{part}"] = torch.cat((mean, torch.zeros_like(mean)))
    state["quant_conv.weight"] = torch.eye(2 * latent, dtype=dtype)[..., None, None]
    state["quant_conv.bias"] = torch.cat((torch.zeros(latent, dtype=dtype), torch.full((latent,), LEAST_LOG_VARIANCE, dtype=dtype)))
    if not config.post_quant_conv:
        state["post_quant_conv.weight"] = torch.eye(latent, dtype=dtype)[..., None, None]
        state["post_quant_conv.bias"] = torch.zeros(latent, dtype=dtype)
    for level in (level for level, temporal in enumerate(config.temporal_folds) if temporal):
        down, up = config.encoder_widths[level], config.decoder_widths[last - 1 - level]
        for prefix, width, outputs in (
            (f"encoder.down_blocks.{level}.downsampler", down, down),
            (f"decoder.up_blocks.{last - 1 - level}.upsampler", up, 2 * up),
        ):
            state[f"{prefix}.time_conv.weight"] = torch.zeros(outputs, width, 1, 1, dtype=dtype)
            state[f"{prefix}.time_conv.bias"] = torch.zeros(outputs, dtype=dtype)
    return state


def _their_name(name: str) -> str:
    """Their name of one of our parameters."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _our_config(config: dict[str, Any]) -> VAEModel:
    """Raises UserError that names the field of theirs which stands in the way."""
    if missing := READ - config.keys():
        raise UserError(f"VAE: the config of {CLASS_NAME} lacks {min(missing)}; allowed is one that diffusers wrote")
    multipliers, fold = config["dim_mult"], config.get("patch_size") or 1
    channels, remainder = divmod(config["in_channels"], fold**2)
    for field, allowed, problem in (
        ("is_residual", "true", config["is_residual"] is not True),
        ("dim_mult", "a list that begins with 1", multipliers[0] != 1),
        ("dropout", "0", config.get("dropout", 0.0) != 0.0),
        ("in_channels", "that many as out_channels, 3 or 4 for each pixel of a patch", remainder or channels not in (3, 4)),
        ("out_channels", "that many as in_channels", config["out_channels"] != config["in_channels"]),
        ("scale_factor_spatial", str(CompressionRatio), CompressionRatio != fold * 2 ** (len(multipliers) - 1)),
        ("latents_mean", "one a channel", len(config["latents_mean"]) != config["z_dim"]),
        ("latents_std", "one above 0 a channel", len(config["latents_std"]) != config["z_dim"] or min(config["latents_std"]) <= 0),
    ):
        if problem:
            raise UserError(f"VAE: found {field} {config.get(field)} in the config of {CLASS_NAME}; allowed is {allowed}")
    decoder_base = config.get("decoder_base_dim") or config["base_dim"]
    return VAEModel(
        latent_channels=config["z_dim"],
        stem_fold=fold,
        encoder_widths=[config["base_dim"] * multiplier for multiplier in multipliers],
        decoder_widths=[decoder_base * multiplier for multiplier in reversed(multipliers)],
        encoder_blocks=config["num_res_blocks"],
        decoder_blocks=config["num_res_blocks"] + 1,
        shortcut="local",
        pixel_channels=channels,
        mixers=False,
        post_quant_conv=True,
        temporal_folds=config["temperal_downsample"] if any(config["temperal_downsample"]) else [],
        norm_eps=NORM_EPS,
    )


def _multipliers(config: VAEModel) -> list[int]:
    """Their `dim_mult`; raises UserError for a model that they cannot represent."""
    encoder, decoder = config.encoder_widths, config.decoder_widths
    multipliers = [width // encoder[0] for width in encoder]
    for field, found, allowed, fits in (
        ("shortcut", config.shortcut, "local, the only one they have", config.shortcut == "local"),
        ("mixers", "true", "false, as they have none", not config.mixers),
        ("mid_attention", "false", "true, as they always have it", config.mid_attention),
        ("norm_eps", config.norm_eps, f"{NORM_EPS}, as their norms add nothing", config.norm_eps == NORM_EPS),
        ("decoder_blocks", config.decoder_blocks, "one more than encoder_blocks", config.decoder_blocks == config.encoder_blocks + 1),
        ("encoder_widths", encoder, "multiples of the first", all(width % encoder[0] == 0 for width in encoder)),
        (
            "decoder_widths",
            decoder,
            "the encoder's multipliers, reversed",
            decoder == [decoder[-1] * multiplier for multiplier in reversed(multipliers)],
        ),
    ):
        if not fits:
            raise UserError(f"VAE: found {field} {found}; to be written as {CLASS_NAME}, allowed is {allowed}")
    return multipliers


def _fold_quant_conv(state: dict[str, Tensor], latent: int) -> dict[str, Tensor]:
    """The encoder's last convolution with the mean's rows of the 1x1 convolution after it, multiplied in double precision."""
    mixing = state["quant_conv.weight"][:latent, :, 0, 0].double()
    weight, bias = state["encoder.conv_out.weight"].double(), state["encoder.conv_out.bias"].double()
    return {
        "encoder.conv_out.weight": torch.einsum("om,mikl->oikl", mixing, weight).float(),
        "encoder.conv_out.bias": (mixing @ bias + state["quant_conv.bias"][:latent].double()).float(),
    }


def _swap_patch(value: Tensor, fold: int, *, dim: int) -> Tensor:
    """Folded pixels with rows and columns of a patch exchanged: they count places down each column, `fold` along each row."""
    if fold == 1:
        return value
    return value.unflatten(dim, (-1, fold, fold)).transpose(dim + 1, dim + 2).flatten(dim, dim + 2).contiguous()
