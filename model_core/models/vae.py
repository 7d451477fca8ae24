"""The f16c64 residual autoencoder: 16 times smaller sides, 64 channels, deterministic (R1 3.1, R2; no KL, no GAN).

Legend: B batch, H and W sides of the picture, h = H / 16, w = W / 16, C latent channels, P channels of a pixel (RGB or
RGBA). The widths and blocks of the default configuration are those of the successor's public code; only what a single picture
needs is kept.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model_core.models.layers import (
    ChannelRMSNorm,
    Downsample,
    ResidualBlock,
    SpatialAttention,
    Upsample,
    cosine_basis,
    fold,
    group_mean,
    group_size,
    repeat_channels,
    shortcut_down,
    shortcut_up,
    unfold,
    unit,
    zero,
)
from model_core.recipe import CompressionRatio, VAEModel


class ResidualVAE(nn.Module):
    """Pictures to latents and back. The per-channel statistics of the latents travel with the weights.

    Raises ValueError when the widths do not allow the shortcut that the configuration asks for.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEModel) -> None:
        super().__init__()
        self.config = config
        self.shortcut = _global_shortcut(config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        if self.shortcut is not None:
            # The shortcut rules at first; the trunks learn what it misses (R2).
            zero(self.encoder.conv_out)
            zero(self.decoder.conv_out)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))
        # Convolutions on a CPU are twice as fast with channels last.
        self.to(memory_format=torch.channels_last)

    def encode(self, images: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) of pictures (B, P, H, W) in [-1, 1]; raises ValueError for sides that 16 does not divide."""
        channels = self.config.pixel_channels
        if images.shape[1] != channels or images.shape[2] % CompressionRatio or images.shape[3] % CompressionRatio:
            raise ValueError(
                f"found pictures of shape {tuple(images.shape)}; allowed are (B, {channels}, H, W), H and W divisible by {CompressionRatio}"
            )
        latents: Tensor = self.encoder(images.contiguous(memory_format=torch.channels_last))
        return latents if self.shortcut is None else latents + self.shortcut.down(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, P, H, W), not clamped, of raw latents (B, C, h, w)."""
        if latents.shape[1] != self.config.latent_channels:
            raise ValueError(f"found latents with {latents.shape[1]} channels; this model has {self.config.latent_channels}")
        images: Tensor = self.decoder(latents.contiguous(memory_format=torch.channels_last))
        return images if self.shortcut is None else images + self.shortcut.up(latents)

    def forward(self, images: Tensor) -> Tensor:
        """The reconstruction of pictures (B, P, H, W)."""
        return self.decode(self.encode(images))

    def standardise(self, latents: Tensor) -> Tensor:
        """Raw latents to zero mean and unit variance a channel: what the transformer sees."""
        return (latents - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def unstandardise(self, latents: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        return latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None]


class Encoder(nn.Module):
    """(B, P, H, W) to (B, C, h, w)."""

    def __init__(self, config: VAEModel) -> None:
        super().__init__()
        widths, self.stem_fold = config.encoder_widths, config.stem_fold
        folds = [*(config.temporal_folds or [False] * (len(widths) - 1)), False]
        self.conv_in = unit(nn.Conv2d(config.pixel_channels * config.stem_fold**2, widths[0], 3, padding=1))
        self.levels = nn.ModuleList(
            DownLevel(before, width, config, last=index == len(widths) - 1, temporal=folds[index])
            for index, (before, width) in enumerate(itertools.pairwise([widths[0], *widths]))
        )
        self.mid = mid_block(widths[-1], config)
        self.norm_out = ChannelRMSNorm(widths[-1], eps=config.norm_eps)
        self.conv_out = unit(nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, P, H, W) to (B, C, h, w)."""
        x = self.conv_in(fold(images, self.stem_fold))
        for level in self.levels:
            x = level(x)
        latents: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return latents


class Decoder(nn.Module):
    """(B, C, h, w) to (B, P, H, W)."""

    def __init__(self, config: VAEModel) -> None:
        super().__init__()
        widths, self.stem_fold = config.decoder_widths, config.stem_fold
        folds = [*(config.temporal_folds[::-1] or [False] * (len(widths) - 1)), False]
        self.post_quant = unit(nn.Conv2d(config.latent_channels, config.latent_channels, 1)) if config.post_quant_conv else nn.Identity()
        self.conv_in = unit(nn.Conv2d(config.latent_channels, widths[0], 3, padding=1))
        self.mid = mid_block(widths[0], config)
        self.levels = nn.ModuleList(
            UpLevel(before, width, config, last=index == len(widths) - 1, temporal=folds[index])
            for index, (before, width) in enumerate(itertools.pairwise([widths[0], *widths]))
        )
        self.norm_out = ChannelRMSNorm(widths[-1], eps=config.norm_eps)
        self.conv_out = unit(nn.Conv2d(widths[-1], config.pixel_channels * config.stem_fold**2, 3, padding=1))

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) to (B, P, H, W)."""
        x = self.mid(self.conv_in(self.post_quant(latents)))
        for level in self.levels:
            x = level(x)
        return unfold(self.conv_out(F.silu(self.norm_out(x))), self.stem_fold)


class DownLevel(nn.Module):
    """Residual blocks, then half the resolution unless it is the last level; around both, the local shortcut."""

    def __init__(self, dim_in: int, dim_out: int, config: VAEModel, *, last: bool, temporal: bool) -> None:
        super().__init__()
        self.blocks = residual_blocks(dim_in, dim_out, config.encoder_blocks, norm_eps=config.norm_eps)
        self.down = None if last else Downsample(dim_out, mixer=config.mixers)
        self.local, self.temporal = config.shortcut == "local", temporal
        if self.local:
            group_size(
                dim_in * (1 if last else 8 if temporal else 4), dim_out, f"encoder_widths: local shortcut from {dim_in} to {dim_out}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim_in, H, W) to (B, dim_out, H / 2, W / 2), or the same sides in the last level."""
        out: Tensor = self.blocks(x)
        if self.down is not None:
            out = self.down(out)
        if not self.local:
            return out
        return out + shortcut_down(x, out.shape[1], factor=1 if self.down is None else 2, temporal=self.temporal)


class UpLevel(nn.Module):
    """Residual blocks, then twice the resolution; around both, the local shortcut. The last level has neither (S)."""

    def __init__(self, dim_in: int, dim_out: int, config: VAEModel, *, last: bool, temporal: bool) -> None:
        super().__init__()
        self.blocks = residual_blocks(dim_in, dim_out, config.decoder_blocks, norm_eps=config.norm_eps)
        self.up = None if last else Upsample(dim_out, mixer=config.mixers)
        self.local, self.temporal = config.shortcut == "local" and not last, temporal
        if self.local:
            group_size((8 if temporal else 4) * dim_out, dim_in, f"decoder_widths: local shortcut from {dim_in} to {dim_out}")

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim_in, H, W) to (B, dim_out, 2 H, 2 W), or the same sides in the last level."""
        out: Tensor = self.blocks(x)
        if self.up is not None:
            out = self.up(out)
        return out + shortcut_up(x, out.shape[1], temporal=self.temporal) if self.local else out


class FoldedShortcut(nn.Module):
    """R2's global skip: a patch folded into channels, averaged in groups to the latent; and the latent repeated and unfolded."""

    def __init__(self, config: VAEModel) -> None:
        super().__init__()
        self.num_channels, self.patch = config.latent_channels, config.pixel_channels * CompressionRatio**2
        group_size(self.patch, config.latent_channels, "latent_channels: global shortcut")

    def down(self, images: Tensor) -> Tensor:
        """(B, P, H, W) to (B, C, h, w)."""
        return group_mean(fold(images, CompressionRatio), self.num_channels)

    def up(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) to (B, P, H, W)."""
        return unfold(repeat_channels(latents, self.patch), CompressionRatio)


class CosineShortcut(nn.Module):
    """The global skip with another fixed basis (ours): the lowest cosine patterns of each patch in place of group means.

    It starts 8 dB above them, which a short run on a CPU does not make up (docs/decisions/0006-cosine-shortcut.md).

    Natural pictures fall off as 1 / frequency, so pattern k is weighted by 1 + |k| on the way in and by its inverse on the
    way out; that keeps the channels' spreads within an order of magnitude.
    """

    basis: Tensor
    weight: Tensor

    def __init__(self, config: VAEModel) -> None:
        super().__init__()
        basis, frequency = cosine_basis(config.latent_channels, CompressionRatio)
        self.register_buffer("basis", basis.flatten(1)[:, :, None, None], persistent=False)
        self.register_buffer("weight", ((1 + frequency) / CompressionRatio)[:, None, None, None], persistent=False)

    def down(self, images: Tensor) -> Tensor:
        """(B, P, H, W) to (B, C, h, w)."""
        return F.conv2d(fold(images, CompressionRatio), self.basis * self.weight)

    def up(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) to (B, P, H, W)."""
        return unfold(F.conv_transpose2d(latents, self.basis / self.weight), CompressionRatio)


def _global_shortcut(config: VAEModel) -> FoldedShortcut | CosineShortcut | None:
    match config.shortcut:
        case "global":
            return FoldedShortcut(config)
        case "cosine":
            return CosineShortcut(config)
        case _:
            return None


def residual_blocks(dim_in: int, dim_out: int, count: int, *, norm_eps: float) -> nn.Sequential:
    """`count` residual blocks, of which the first changes the width."""
    return nn.Sequential(*(ResidualBlock(dim_in if index == 0 else dim_out, dim_out, norm_eps=norm_eps) for index in range(count)))


def mid_block(dim: int, config: VAEModel) -> nn.Sequential:
    """Residual block, self-attention, residual block at the latent's resolution; R2's suite goes without the attention."""
    eps = config.norm_eps
    attention = [SpatialAttention(dim, norm_eps=eps)] if config.mid_attention else []
    return nn.Sequential(ResidualBlock(dim, dim, norm_eps=eps), *attention, ResidualBlock(dim, dim, norm_eps=eps))


def save_vae(vae: ResidualVAE, folder: Path) -> None:
    """Writes `config.json` and `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model": vae.config.model_dump(mode="json")}, indent=2, sort_keys=True) + "\n")
    save_file({name: value.contiguous() for name, value in vae.state_dict().items()}, folder / "model.safetensors")


def load_vae(folder: Path) -> ResidualVAE:
    """The model that `save_vae` wrote, in evaluation mode."""
    vae = ResidualVAE(VAEModel.model_validate(json.loads((folder / "config.json").read_text())["model"]))
    vae.load_state_dict(load_file(folder / "model.safetensors"))
    return vae.eval()
