"""The f16c64 residual autoencoder (R1 3.1, after DC-AE): pure 2-D, deterministic latent, non-parametric shortcuts.

Widths and blocks default to the successor's public code. The shortcut is a switch (R2 4.1): `local` folds or unfolds pixels
around each level; `global` takes the picture's 16 x 16 patches straight to the latent and back, which converges fastest.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model_core.recipe import CompressionRatio, VAEModel

PATCH = CompressionRatio


class ResidualVAE(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] to latents (B, C, H/16, W/16) and back. "Variational" by name only: no KL, no noise (R2)."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEModel) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, images: Tensor) -> Tensor:
        """Raw latents (B, C, H/16, W/16). Raises ValueError when a side is no multiple of 16."""
        if images.shape[-1] % PATCH or images.shape[-2] % PATCH:
            raise ValueError(f"sides {tuple(images.shape[-2:])} are not multiples of {PATCH}")
        latents: Tensor = self.encoder(images.contiguous(memory_format=torch.channels_last))
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, 16 h, 16 w) of raw latents, not clamped."""
        images: Tensor = self.decoder(latents.contiguous(memory_format=torch.channels_last))
        return images

    def standardise(self, latents: Tensor) -> Tensor:
        """(z - mean) / std for each channel: what the transformer sees."""
        return (latents - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def unstandardise(self, latents: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        return latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None]


class Encoder(nn.Module):
    """Stem, levels that halve the sides, middle, latent."""

    def __init__(self, config: VAEModel) -> None:
        super().__init__()
        widths, self.fold = config.encoder_widths, config.stem_fold
        self.stem = nn.Conv2d(3 * self.fold**2, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for index, (before, width) in enumerate(pairwise([widths[0], *widths])):
            self.levels.append(DownLevel(before, width, config.encoder_blocks, down=index + 1 < len(widths), shortcut=config.shortcut == "local"))
        self.middle = middle(widths[-1], attention=config.mid_attention)
        self.norm = ChannelNorm(widths[-1])
        self.out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)
        self.shortcut = patch_projection(config.latent_channels, to_latent=True) if config.shortcut == "global" else None
        if self.shortcut is not None:
            zero(self.out)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(F.pixel_unshuffle(images, self.fold))
        for level in self.levels:
            x = level(x)
        latents: Tensor = self.out(F.silu(self.norm(self.middle(x))))
        return latents if self.shortcut is None else latents + self.shortcut(F.pixel_unshuffle(images, PATCH))


class Decoder(nn.Module):
    """Latent, middle, levels that double the sides, picture."""

    def __init__(self, config: VAEModel) -> None:
        super().__init__()
        widths, self.fold = config.decoder_widths, config.stem_fold
        self.stem = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = middle(widths[0], attention=config.mid_attention)
        self.levels = nn.ModuleList()
        for index, (before, width) in enumerate(pairwise([widths[0], *widths])):
            self.levels.append(UpLevel(before, width, config.decoder_blocks, up=index + 1 < len(widths), shortcut=config.shortcut == "local"))
        self.norm = ChannelNorm(widths[-1])
        self.out = nn.Conv2d(widths[-1], 3 * self.fold**2, 3, padding=1)
        self.shortcut = patch_projection(config.latent_channels, to_latent=False) if config.shortcut == "global" else None
        if self.shortcut is not None:
            zero(self.out)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.middle(self.stem(latents))
        for level in self.levels:
            x = level(x)
        images = F.pixel_shuffle(self.out(F.silu(self.norm(x))), self.fold)
        return images if self.shortcut is None else images + F.pixel_shuffle(self.shortcut(latents), PATCH)


class DownLevel(nn.Module):
    """Residual blocks, then half the sides by a strided convolution (padded right and below)."""

    def __init__(self, before: int, width: int, num_blocks: int, *, down: bool, shortcut: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResBlock(before if index == 0 else width, width) for index in range(num_blocks)))
        self.down = nn.Conv2d(width, width, 3, stride=2) if down else None
        self.width, self.shortcut = width, shortcut
        if shortcut:
            check_groups(before * (4 if down else 1), width, "encoder")

    def forward(self, x: Tensor) -> Tensor:
        result = self.blocks(x)
        if self.down is not None:
            result = self.down(F.pad(result, (0, 1, 0, 1)))
        if self.shortcut:
            folded = x if self.down is None else F.pixel_unshuffle(x, 2)
            result = result + folded.unflatten(1, (self.width, -1)).mean(dim=2)
        return result


class UpLevel(nn.Module):
    """Residual blocks, then twice the sides by nearest neighbours and a convolution."""

    def __init__(self, before: int, width: int, num_blocks: int, *, up: bool, shortcut: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResBlock(before if index == 0 else width, width) for index in range(num_blocks)))
        self.up = nn.Conv2d(width, width, 3, padding=1) if up else None
        # The last level has no shortcut: it would have to drop channels (public code of Qwen-Image-2.1).
        self.repeats = 4 * width // before if shortcut and up else 0
        if self.repeats:
            check_groups(4 * width, before, "decoder")

    def forward(self, x: Tensor) -> Tensor:
        result = self.blocks(x)
        if self.up is not None:
            result = self.up(F.interpolate(result, scale_factor=2.0, mode="nearest"))
        if self.repeats:
            result = result + F.pixel_shuffle(x.repeat_interleave(self.repeats, dim=1), 2)
        return result


class ResBlock(nn.Module):
    """RMS norm, SiLU, 3 x 3 convolution, twice; a 1 x 1 convolution beside it where the width changes."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(before), nn.Conv2d(before, width, 3, padding=1)
        self.norm2, self.conv2 = ChannelNorm(width), zero(nn.Conv2d(width, width, 3, padding=1))
        self.beside = nn.Identity() if before == width else nn.Conv2d(before, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        result = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return self.beside(x) + result


class Attention(nn.Module):
    """Single-head self-attention over all places, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = ChannelNorm(width), nn.Conv2d(width, 3 * width, 1), zero(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        return x + self.out(attended.transpose(1, 2).unflatten(2, x.shape[2:]))


class ChannelNorm(nn.Module):
    """RMS norm over channels with a learned scale: x sqrt(C) / |x| gamma."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (self.gamma * math.sqrt(len(self.gamma)))[:, None, None]


def middle(width: int, *, attention: bool) -> nn.Sequential:
    """Residual block, attention, residual block."""
    return nn.Sequential(ResBlock(width, width), Attention(width) if attention else nn.Identity(), ResBlock(width, width))


def zero(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution with zero weights: its branch is silent at first, so that the shortcut rules."""
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def check_groups(channels: int, width: int, where: str) -> None:
    """Raises ValueError when `channels` cannot be averaged or repeated into `width` equal groups."""
    if channels % width:
        raise ValueError(f"{where}: a local shortcut cannot map {channels} folded channels onto {width}; the widths must divide")


def patch_projection(latent_channels: int, *, to_latent: bool) -> nn.Conv2d:
    """The global shortcut: one linear map between a 16 x 16 patch's 768 values and the latent, learned from a DCT.

    R2 adds the folded pixels to the deepest features, whose projection to the latent is learned. Here that projection is
    a layer of its own, so that it does not depend on the trunk's width; it starts as the `latent_channels` lowest
    frequencies of luma and of the two colour differences, and as their transpose on the way back.
    """
    basis = dct_basis(latent_channels)
    weight = basis if to_latent else basis.T
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    with torch.no_grad():
        conv.weight.copy_(weight[:, :, None, None])
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def dct_basis(num: int) -> Tensor:
    """`num` orthonormal rows over the values (colour, row, column) of a patch: (num, 768).

    Products of DCT-II frequencies with luma and two colour differences, in rising order of (u^2 + v^2 + 1), colour
    differences counted as eight times as high.
    """
    index = torch.arange(PATCH, dtype=torch.float64)
    waves = torch.cos(math.pi * index[:, None] * (2 * index[None] + 1) / (2 * PATCH)) * math.sqrt(2 / PATCH)
    waves[0] /= math.sqrt(2)
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]], dtype=torch.float64)
    colours /= colours.norm(dim=1, keepdim=True)
    ranked = sorted(((u * u + v * v + 1) * (1 if c == 0 else 8), c, u, v) for c in range(3) for u in range(PATCH) for v in range(PATCH))
    rows = [torch.einsum("c,i,j->cij", colours[c], waves[u], waves[v]).flatten() for _, c, u, v in ranked[:num]]
    return torch.stack(rows).float()


def save_vae(vae: ResidualVAE, folder: Path) -> None:
    """Writes `config.json` and `model.safetensors`, latent statistics among the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(vae.config.model_dump(mode="json"), indent=2, sort_keys=True) + "\n")
    save_file({name: value.contiguous() for name, value in vae.state_dict().items()}, folder / "model.safetensors")


def load_vae(folder: Path) -> ResidualVAE:
    """The frozen VAE that `save_vae` wrote."""
    vae = ResidualVAE(VAEModel.model_validate_json((folder / "config.json").read_text()))
    vae.load_state_dict(load_file(folder / "model.safetensors"))
    return vae.eval().requires_grad_(False)
