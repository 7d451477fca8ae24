"""The autoencoder as diffusers' `AutoencoderKLQwenImage21`, both ways, without diffusers: names, configuration and folder.

Their module is a video autoencoder of one frame. What a picture never reads has no place here: the temporal convolutions and the
log-variance half of the posterior. Written out, the former are zero and the latter is diffusers' least, e^-30, as this model
is deterministic. Their 1x1 convolution after the encoder is folded into the convolution before it, which is exact but for rounding.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_core.documents import UserError
from model_core.models.vae import ResidualVAE
from model_core.recipe import CompressionRatio, VAEModel

CLASS_NAME = "AutoencoderKLQwenImage21"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
NORM_EPS = 1e-24  # they divide by the norm itself, which is kept above 1e-12
LEAST_LOG_VARIANCE = -30.0  # diffusers clamps there

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


def their_name(name: str) -> str:
    """Their name of one of our parameters."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def to_diffusers(vae: ResidualVAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Their configuration and state dict; raises UserError for a model that they cannot represent."""
    config = vae.config
    widths = config.encoder_widths
    multipliers = _multipliers(config)
    latent, fold = config.latent_channels, config.stem_fold
    settings = {
        "_class_name": CLASS_NAME,
        "base_dim": widths[0],
        "decoder_base_dim": config.decoder_widths[-1],
        "z_dim": latent,
        "dim_mult": multipliers,
        "num_res_blocks": config.encoder_blocks,
        "attn_scales": [],
        "temperal_downsample": config.temporal_folds or [False] * (len(widths) - 1),
        "dropout": 0.0,
        "latents_mean": vae.latent_mean.tolist(),
        "latents_std": vae.latent_std.tolist(),
        "is_residual": True,
        "in_channels": config.pixel_channels * fold**2,
        "out_channels": config.pixel_channels * fold**2,
        "patch_size": None if fold == 1 else fold,
        "scale_factor_temporal": 2 ** sum(config.temporal_folds),
        "scale_factor_spatial": CompressionRatio,
    }
    state = {}
    for name, value in vae.state_dict().items():
        if name in ("latent_mean", "latent_std"):
            continue
        theirs = their_name(name)
        # The attention's norm sees pictures, all others videos; each keeps that many axes of size one.
        axes = 2 if ".attentions." in theirs else 3
        state[theirs] = value.reshape(-1, *[1] * axes) if theirs.endswith(".gamma") else value.contiguous()
    state["encoder.conv_in.weight"] = _swap_patch(state["encoder.conv_in.weight"], fold, dim=1)
    for part in ("weight", "bias"):
        state[f"decoder.conv_out.{part}"] = _swap_patch(state[f"decoder.conv_out.{part}"], fold, dim=0)
        mean = state[f"encoder.conv_out.{part}"]
        state[f"encoder.conv_out.{part}"] = torch.cat((mean, torch.zeros_like(mean)))
    dtype = vae.latent_mean.dtype
    state["quant_conv.weight"] = torch.eye(2 * latent, dtype=dtype)[..., None, None]
    state["quant_conv.bias"] = torch.zeros(2 * latent, dtype=dtype)
    state["quant_conv.bias"][latent:] = LEAST_LOG_VARIANCE
    if not config.post_quant_conv:
        state["post_quant_conv.weight"] = torch.eye(latent, dtype=dtype)[..., None, None]
        state["post_quant_conv.bias"] = torch.zeros(latent, dtype=dtype)
    for level in (level for level, temporal in enumerate(config.temporal_folds) if temporal):
        down, up = widths[level], config.decoder_widths[-2 - level]
        for prefix, width, outputs in (
            (f"encoder.down_blocks.{level}.downsampler", down, down),
            (f"decoder.up_blocks.{len(widths) - 2 - level}.upsampler", up, 2 * up),
        ):
            state[f"{prefix}.time_conv.weight"] = torch.zeros(outputs, width, 1, 1, dtype=dtype)
            state[f"{prefix}.time_conv.bias"] = torch.zeros(outputs, dtype=dtype)
    return settings, state


def from_diffusers(config: dict[str, Any], state: dict[str, Tensor]) -> ResidualVAE:
    """The autoencoder of their configuration and state dict, in evaluation mode.

    Raises UserError for a configuration that this one cannot represent and for a state dict that does not fit it.
    """
    vae = ResidualVAE(_our_config(config))
    fold, latent = vae.config.stem_fold, vae.config.latent_channels
    theirs = {name: value for name, value in state.items() if ".time_conv." not in name}
    wanted = {their_name(name): name for name in vae.state_dict() if name not in ("latent_mean", "latent_std")}
    names = {*wanted, "quant_conv.weight", "quant_conv.bias"}
    if names != theirs.keys():
        odd = min(names ^ theirs.keys())
        raise UserError(
            f"VAE: its {CLASS_NAME} weights {'lack' if odd in names else 'hold an unknown'} {odd}; allowed are those of its config"
        )
    theirs = {name: value.float() for name, value in theirs.items()}
    theirs |= _fold_quant_conv(theirs, latent)
    theirs["encoder.conv_in.weight"] = _swap_patch(theirs["encoder.conv_in.weight"], fold, dim=1)
    for part in ("weight", "bias"):
        theirs[f"decoder.conv_out.{part}"] = _swap_patch(theirs[f"decoder.conv_out.{part}"], fold, dim=0)
    ours = {name: theirs[their] for their, name in wanted.items()}
    ours = {name: value.flatten() if name.endswith(".gamma") else value for name, value in ours.items()}
    for name in ("latent_mean", "latent_std"):
        ours[name] = torch.tensor(config[name.replace("latent_", "latents_")], dtype=torch.float32)
    for name, value in vae.state_dict().items():
        if ours[name].shape != value.shape:
            raise UserError(f"VAE: {their_name(name)} has shape {tuple(ours[name].shape)}; its config asks for {tuple(value.shape)}")
    vae.load_state_dict(ours)
    return vae.eval()


def write_diffusers(vae: ResidualVAE, folder: Path) -> None:
    """Writes the folder that diffusers' `from_pretrained` reads; raises UserError for a model that they cannot represent."""
    config, state = to_diffusers(vae)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def is_diffusers(folder: Path) -> bool:
    """Whether a folder's `config.json` is of their autoencoder."""
    return json.loads((folder / CONFIG).read_text()).get("_class_name") == CLASS_NAME


def read_diffusers(folder: Path) -> ResidualVAE:
    """The autoencoder in a folder of theirs, its weights whole or in shards; raises UserError when it is none."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        files = [WEIGHTS]
        if (folder / INDEX).is_file():
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        state = {name: value for file in files for name, value in load_file(folder / file).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"VAE {folder}: cannot be read ({str(error).splitlines()[0]}); allowed is a folder with {CONFIG} and {WEIGHTS}"
        ) from error
    if config.get("_class_name") != CLASS_NAME:
        raise UserError(f"VAE {folder}: found _class_name {config.get('_class_name')!r}; allowed is {CLASS_NAME}")
    return from_diffusers(config, state)


def _our_config(config: dict[str, Any]) -> VAEModel:
    """Raises UserError that names the field of theirs which stands in the way."""
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
