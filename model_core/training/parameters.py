"""How many parameters each model has, part by part, from its configuration alone: nothing is built.

Legend: D width of the stream, H hidden width of its SwiGLU, C latent channels, E channels of the text states.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_core.documents import UserError
from model_core.recipe import CompressionRatio, Encoder, MMDiTModel, VAEModel

RGB = 3
TIME_CHANNELS = 256  # sinusoids of the time embedding; public code of Qwen-Image-2.1


def hidden_width(config: MMDiTModel) -> int:
    """H, the hidden width of the SwiGLU."""
    return round(config.mlp_ratio * config.width)


def block_matrices(config: MMDiTModel) -> int:
    """Parameters of the four matrices of a block: queries, keys and values, attention's output, SwiGLU in and out."""
    return 4 * config.width**2 + 3 * config.width * hidden_width(config)


def mmdit_parameters(config: MMDiTModel, *, latent_channels: int, text_dim: int) -> dict[str, int]:
    """Parameters of the MMDiT by part."""
    width = config.width
    return {
        "blocks": config.num_layers * (block_matrices(config) + 2 * config.head_dim),
        "modulation": 4 * width**2,
        "text in": text_dim * width + width**2 + text_dim,
        "time in": TIME_CHANNELS * width + width**2,
        "image in": latent_channels * width,
        "image out": width**2 + width * latent_channels,
    }


@dataclass(frozen=True)
class Convolution:
    """A convolution with bias: `kernel` x `kernel`, at a grid whose sides are the picture's over `reduction`; `norm` is the channels
    of the norm before it, 0 where there is none."""

    dim_in: int
    dim_out: int
    kernel: int
    reduction: int
    norm: int = 0

    @property
    def parameters(self) -> int:
        """Weights, bias and the norm's scales."""
        return self.kernel**2 * self.dim_in * self.dim_out + self.dim_out + self.norm


def encoder_convolutions(config: VAEModel) -> list[Convolution]:
    """Every convolution of the VAE's encoder, in order."""
    widths = config.encoder_widths
    at: int = config.stem_fold
    found = [Convolution(config.pixel_channels * at**2, widths[0], 3, at)]
    for index, (before, width) in enumerate(itertools.pairwise([widths[0], *widths])):
        found += _residual_blocks(before, width, config.encoder_blocks, at)
        if index < len(widths) - 1:
            at *= 2
            found += [Convolution(width, width, 3, at), *_mixer(width, config, at)]
    return [*found, *_mid_block(widths[-1], config), Convolution(widths[-1], config.latent_channels, 3, at, norm=widths[-1])]


def decoder_convolutions(config: VAEModel) -> list[Convolution]:
    """Every convolution of the VAE's decoder, in order."""
    widths, at = config.decoder_widths, CompressionRatio
    channels = config.latent_channels
    found = [Convolution(channels, channels, 1, at)] if config.post_quant_conv else []
    found += [Convolution(channels, widths[0], 3, at), *_mid_block(widths[0], config)]
    for index, (before, width) in enumerate(itertools.pairwise([widths[0], *widths])):
        found += _residual_blocks(before, width, config.decoder_blocks, at)
        if index < len(widths) - 1:
            at //= 2
            found += [*_mixer(width, config, 2 * at), Convolution(width, width, 3, at)]
    return [*found, Convolution(widths[-1], config.pixel_channels * at**2, 3, at, norm=widths[-1])]


def vae_parameters(config: VAEModel) -> dict[str, int]:
    """Parameters of the VAE by part."""
    parts = {"encoder": encoder_convolutions(config), "decoder": decoder_convolutions(config)}
    return {name: sum(convolution.parameters for convolution in part) for name, part in parts.items()}


def _residual_blocks(dim_in: int, dim_out: int, count: int, at: int) -> list[Convolution]:
    found = []
    for before in [dim_in] + [dim_out] * (count - 1):
        found += [Convolution(before, dim_out, 3, at, norm=before), Convolution(dim_out, dim_out, 3, at, norm=dim_out)]
        found += [] if before == dim_out else [Convolution(before, dim_out, 1, at)]
    return found


def _mixer(dim: int, config: VAEModel, at: int) -> list[Convolution]:
    return [Convolution(dim, 2 * dim, 1, at)] if config.mixers else []


def _mid_block(dim: int, config: VAEModel) -> list[Convolution]:
    at = CompressionRatio
    attention = [Convolution(dim, 3 * dim, 1, at, norm=dim), Convolution(dim, dim, 1, at)] if config.mid_attention else []
    return [*_residual_blocks(dim, dim, 1, at), *attention, *_residual_blocks(dim, dim, 1, at)]


@dataclass(frozen=True, kw_only=True)
class VisionSizes:
    """The vision tower of a Qwen3-VL: what its `vision_config` says."""

    depth: int
    hidden_size: int
    intermediate_size: int
    out_hidden_size: int
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    num_position_embeddings: int = 2304
    num_deepstack: int = 3

    @property
    def parameters(self) -> int:
        """All of the tower: patches, positions, blocks, the merger and those of the deep stack. All have biases."""
        dim, merged = self.hidden_size, self.hidden_size * self.spatial_merge_size**2
        block = 4 * dim**2 + 4 * dim + 2 * dim * self.intermediate_size + self.intermediate_size + dim + 4 * dim
        patches = (RGB * self.temporal_patch_size * self.patch_size**2 + 1) * dim
        merger = merged**2 + merged + merged * self.out_hidden_size + self.out_hidden_size
        norms = 2 * dim + self.num_deepstack * 2 * merged
        return patches + self.num_position_embeddings * dim + self.depth * block + (1 + self.num_deepstack) * merger + norms


@dataclass(frozen=True, kw_only=True)
class EncoderSizes:
    """A Qwen3-VL: what its `text_config` says, and its vision tower."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool  # whether the head's matrix is the embedding's
    vision: VisionSizes

    @property
    def layer_matrices(self) -> int:
        """Parameters of the matrices of a text layer: queries, keys, values, output, SwiGLU."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters by part."""
        norms = self.num_layers * (2 * self.hidden_size + 2 * self.head_dim) + self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return {"text layers": self.num_layers * self.layer_matrices + norms, "embeddings": embeddings, "vision": self.vision.parameters}


QWEN3_VL_8B = EncoderSizes(  # config.json of Qwen3-VL-8B-Instruct
    hidden_size=4096,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=12288,
    vocab_size=151936,
    tied=False,
    vision=VisionSizes(depth=27, hidden_size=1152, intermediate_size=4304, out_hidden_size=4096),
)


def encoder_sizes(config: Encoder) -> EncoderSizes:
    """The sizes of the recipe's condition encoder: of the tiny one, of the folder at its path, or of the published one it names.

    Raises UserError when the folder is not there and the sizes in the recipe are those of no published model known here.
    """
    if config.path is None:
        return _tiny(config)
    file = Path(config.path).expanduser() / "config.json"
    if file.is_file():
        return _published(json.loads(file.read_text()), where=str(file))
    named = (config.hidden_size, config.num_layers, config.num_heads, config.vocab_size)
    if named != (QWEN3_VL_8B.hidden_size, QWEN3_VL_8B.num_layers, QWEN3_VL_8B.num_heads, QWEN3_VL_8B.vocab_size):
        raise UserError(
            f"encoder.path: {config.path} holds no config.json to read sizes from; allowed without one are those of Qwen3-VL-8B: "
            "hidden_size 4096, num_layers 36, num_heads 32, vocab_size 151936"
        )
    return QWEN3_VL_8B


def _tiny(config: Encoder) -> EncoderSizes:
    """What model_core.models.condition makes when the recipe names no folder."""
    return EncoderSizes(
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_heads,
        head_dim=config.hidden_size // config.num_heads,
        intermediate_size=3 * config.hidden_size,
        vocab_size=config.vocab_size,
        tied=False,
        vision=VisionSizes(
            depth=1, hidden_size=32, intermediate_size=64, out_hidden_size=config.hidden_size, num_position_embeddings=16, num_deepstack=1
        ),
    )


def _published(document: Mapping[str, Any], *, where: str) -> EncoderSizes:
    try:
        text, vision = document["text_config"], document["vision_config"]
        return EncoderSizes(
            hidden_size=text["hidden_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            head_dim=text["head_dim"],
            intermediate_size=text["intermediate_size"],
            vocab_size=text["vocab_size"],
            tied=document.get("tie_word_embeddings", False),
            vision=VisionSizes(
                **{name: vision[name] for name in ("depth", "hidden_size", "intermediate_size", "out_hidden_size", "patch_size")},
                **{name: vision[name] for name in ("temporal_patch_size", "spatial_merge_size", "num_position_embeddings")},
                num_deepstack=len(vision["deepstack_visual_indexes"]),
            ),
        )
    except KeyError as error:
        raise UserError(f"encoder.path: {where} has no {error.args[0]}; allowed is the configuration of a Qwen3-VL") from error
