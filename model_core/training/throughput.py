"""How much arithmetic a batch is, and how well it was used: the conventions of docs/reference/throughput.md, one function each.

A multiply-add is two FLOPs. Matrix products, convolutions and attention count; norms, rotations, activations and the loss do not.
Legend: D width of the stream, S tokens of a sample, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from model_core.models.segments import Sample, num_tokens, text_runs
from model_core.recipe import CompressionRatio, MMDiTModel, VAEModel
from model_core.training.parameters import (
    RGB,
    TIME_CHANNELS,
    Convolution,
    EncoderSizes,
    block_matrices,
    decoder_convolutions,
    encoder_convolutions,
)

Checkpointing = Literal["none", "selective", "full"]  # of activations; model_core.training.memory says what each keeps


@dataclass(frozen=True)
class Accelerator:
    """A GPU as its data sheet has it: dense bf16 FLOP/s, and bytes of memory."""

    peak_flops: float
    memory_bytes: int


GPUS = {
    "a100": Accelerator(312e12, 80 * 10**9),  # NVIDIA A100 80GB SXM data sheet
    "h100": Accelerator(989e12, 80 * 10**9),  # NVIDIA H100 SXM data sheet: 1,979e12 with sparsity
    "h200": Accelerator(989e12, 141 * 10**9),  # NVIDIA H200 SXM data sheet: 1,979e12 with sparsity
    "b200": Accelerator(2250e12, 180 * 10**9),  # NVIDIA HGX B200 data sheet: 4,500e12 with sparsity
    "gb200": Accelerator(2500e12, 186 * 10**9),  # NVIDIA GB200 NVL72 data sheet, a GPU: 5,000e12 with sparsity
}


def attention_pairs(sample: Sample, *, attention: Literal["full", "block_causal"]) -> int:
    """Pairs of a query and a key that it looks at.

    Full: S^2. Block-causal (public code of Qwen-Image-2.1): text token i looks at i + 1 tokens, each image at all before it and itself.
    """
    lengths = [num_tokens(segment) for segment in sample]
    if attention == "full":
        return sum(lengths) ** 2
    pairs = before = 0
    for segment, length in zip(sample, lengths, strict=True):
        pairs += length * before + (length * (length + 1) // 2 if isinstance(segment, int) else length**2)
        before += length
    return pairs


def mmdit_forward_flops(config: MMDiTModel, samples: Sequence[Sample], *, latent_channels: int, text_dim: int) -> int:
    """Forward FLOPs of one pass over a packed batch: 2 a parameter and token for linear layers, 4 D a pair for attention.

    A layer is counted where it works: text projection on text, image projection on images, the last layer and what follows attention
    in the last block on targets; time embedding and the modulation shared by all blocks once a sample, and once more a pass for what is
    modulated at t = 0.
    """
    width, num = config.width, len(samples)
    text = sum(sum(text_runs(sample)) for sample in samples)
    target = sum(num_tokens(sample[-1]) for sample in samples)
    stream = sum(num_tokens(segment) for sample in samples for segment in sample)
    pairs = sum(attention_pairs(sample, attention=config.attention) for sample in samples)
    times = num + (1 if config.condition_at_t0 else 0)
    time = TIME_CHANNELS * width + width**2 + 4 * width**2  # its two layers, and the modulation
    linear = (
        config.num_layers * block_matrices(config) * stream
        - (block_matrices(config) - 3 * width**2) * (stream - target)
        + (text_dim * width + width**2) * text
        + latent_channels * width * (stream - text)
        + time * times
        + width**2 * num  # the final norm's scale
        + width * latent_channels * target
    )
    return 2 * linear + config.num_layers * 4 * width * pairs


def training_flops(forward: int, *, checkpointing: Checkpointing = "none") -> int:
    """FLOPs of forward and backward pass: 3 x forward (Kaplan et al. 2020, 2.1).

    Full activation checkpointing computes the forward pass twice: 4 x. Selective keeps what matrix products and attention gave, so it
    repeats nothing that counts. Model FLOPs, which MFU is about, are those without checkpointing.
    """
    return (4 if checkpointing == "full" else 3) * forward


def vae_encoder_flops(config: VAEModel, *, height: int, width: int) -> int:
    """FLOPs that encode one picture of `height` x `width` pixels."""
    return _vae_flops(config, encoder_convolutions(config), config.encoder_widths[-1], height, width)


def vae_decoder_flops(config: VAEModel, *, height: int, width: int) -> int:
    """FLOPs that decode one picture of `height` x `width` pixels."""
    return _vae_flops(config, decoder_convolutions(config), config.decoder_widths[0], height, width)


def _vae_flops(config: VAEModel, convolutions: Iterable[Convolution], mid_dim: int, height: int, width: int) -> int:
    weights = sum(
        2 * layer.kernel**2 * layer.dim_in * layer.dim_out * (height // layer.reduction) * (width // layer.reduction)
        for layer in convolutions
    )
    sites = (height // CompressionRatio) * (width // CompressionRatio)
    attention = 4 * mid_dim * sites**2 if config.mid_attention else 0
    # The cosine shortcut is a product with a fixed basis; the others add and copy.
    basis = 2 * RGB * CompressionRatio**2 * config.latent_channels * sites if config.shortcut == "cosine" else 0
    return weights + attention + basis


def text_encoder_flops(sizes: EncoderSizes, *, tokens: int) -> int:
    """FLOPs of the frozen encoder's text layers for one prompt of `tokens` tokens, without the head, which the states do not need.

    All pairs of attention count, those too that its causal mask hides.
    """
    return 2 * sizes.num_layers * sizes.layer_matrices * tokens + sizes.num_layers * 4 * sizes.num_heads * sizes.head_dim * tokens**2


def flops_utilisation(flops: float, *, seconds: float, peak_flops: float, gpus: int = 1) -> float:
    """FLOPs done in `seconds` over what the GPUs could have done at their peak.

    With model FLOPs this is MFU (Chowdhery et al. 2022, appendix B); with those that checkpointing repeats added, HFU.
    """
    return flops / (seconds * peak_flops * gpus)


def goodput(*, steps: int, repeated_steps: int, skipped_steps: int, step_seconds: float, wall_seconds: float) -> float:
    """Share of wall time spent in optimizer steps that count.

    Of the `steps` that were done, those repeated after a restart and those skipped (a loss that is not finite) do not count; waiting,
    starting and saving are the rest of the wall time. `step_seconds` is the mean time of a step.
    """
    return (steps - repeated_steps - skipped_steps) * step_seconds / wall_seconds
