"""What a run would cost, from the recipe alone: parameters, memory, FLOPs, GPU hours, bytes. Nothing is built, read or written.

Which steps a run would do, and which results it would reuse, is another question: pipelines.plan.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from model_core.data.reads import row_group_reads
from model_core.data.shard_writer import ROW_GROUP_BYTES
from model_core.documents import UserError
from model_core.models.segments import Sample, num_tokens
from model_core.recipe import CompressionRatio, Recipe, Stage
from model_core.storage.settings import S3Settings
from model_core.training.memory import BF16, FP32, StateMemory, activation_peak, largest_micro_batch, state_memory
from model_core.training.parameters import EncoderSizes, encoder_sizes, mmdit_parameters, vae_parameters
from model_core.training.throughput import (
    GPUS,
    Checkpointing,
    mmdit_forward_flops,
    text_encoder_flops,
    training_flops,
    vae_decoder_flops,
    vae_encoder_flops,
)

POLICIES: tuple[Checkpointing, ...] = ("none", "selective", "full")
CHECKPOINT_BYTES = 4 * FP32  # a parameter: weights, their average, two moments
FIRST_RANKS_FILES = 3  # .metadata, values.json, COMMIT.json


@dataclass(frozen=True)
class Hardware:
    """What the run is assumed to have."""

    gpus: int
    gpu: str
    peak_flops: float  # dense bf16, a GPU
    memory_bytes: int  # a GPU
    mfu: float
    shards: int  # GPUs that share one copy of the training state


@dataclass(frozen=True)
class Memory:
    """Memory of a GPU: `state` by part; activations a token, and the most tokens of a pass, by checkpointing policy."""

    state: StateMemory
    activations_a_token: dict[Checkpointing, int]
    largest_micro_batch: dict[Checkpointing, int]


@dataclass(frozen=True)
class StageCost:
    """One entry of the curriculum."""

    name: str
    resolution_px: int
    steps: int
    samples: int
    tokens_a_step: int
    tokens: int
    longest_sample_tokens: int
    training_flops: float
    encoder_flops: float
    gpu_hours: float
    days: float
    read_bytes: int
    read_requests: int
    checkpoints: int
    written_bytes: int
    write_requests: int


@dataclass(frozen=True)
class Cost:
    """What `darkroom plan` tells."""

    recipe: str
    hardware: Hardware
    caption_tokens: int
    parameters: dict[str, dict[str, int]]  # by model, by part
    memory: Memory
    vae_training_flops: float
    vae_gpu_hours: float
    vae_days: float
    stages: list[StageCost]

    @property
    def totals(self) -> dict[str, float]:
        """Sums over the stages; GPU hours and days with those of the autoencoder."""
        names = ("steps", "samples", "tokens", "training_flops", "encoder_flops", "gpu_hours", "days")
        stores = ("read_bytes", "read_requests", "checkpoints", "written_bytes", "write_requests")
        sums: dict[str, float] = {name: sum(getattr(stage, name) for stage in self.stages) for name in (*names, *stores)}
        return sums | {"gpu_hours": sums["gpu_hours"] + self.vae_gpu_hours, "days": sums["days"] + self.vae_days}

    def to_json(self) -> dict[str, Any]:
        """The same for a script."""
        return asdict(self) | {"totals": self.totals}


def assumed_hardware(*, gpus: int, gpu: str, mfu: float, peak_tflops: float | None, shards: int | None) -> Hardware:
    """The hardware that the options name; raises UserError for what cannot be."""
    if gpus < 1:
        raise UserError(f"--gpus: found {gpus}; allowed is 1 or more")
    if gpu not in GPUS:
        raise UserError(f"--gpu: found {gpu!r}; allowed are {', '.join(GPUS)}")
    if not 0.0 < mfu <= 1.0:
        raise UserError(f"--mfu: found {mfu}; allowed is above 0, up to 1")
    if peak_tflops is not None and not (peak_tflops > 0.0 and math.isfinite(peak_tflops)):
        raise UserError(f"--peak-tflops: found {peak_tflops}; allowed is above 0")
    if shards is not None and (shards < 1 or gpus % shards):
        raise UserError(f"--shards: found {shards}; allowed are divisors of the {gpus} GPUs")
    known = GPUS[gpu]
    peak = known.peak_flops if peak_tflops is None else peak_tflops * 1e12
    return Hardware(gpus, gpu, peak, known.memory_bytes, mfu, shards or gpus)


def estimate_cost(recipe: Recipe, hardware: Hardware, *, caption_tokens: int) -> Cost:
    """The cost of a run of `recipe` when every prompt has `caption_tokens` tokens; raises UserError for sizes that are not known."""
    if not 1 <= caption_tokens <= recipe.captions.max_tokens:
        allowed = f"1 to {recipe.captions.max_tokens}, the recipe's captions.max_tokens"
        raise UserError(f"--caption-tokens: found {caption_tokens}; allowed are {allowed}")
    encoder, channels = encoder_sizes(recipe.encoder), recipe.vae.model.latent_channels
    config = recipe.mmdit.model
    parameters = {
        "mmdit": mmdit_parameters(config, latent_channels=channels, text_dim=encoder.hidden_size),
        "vae": vae_parameters(recipe.vae.model),
        "encoder": encoder.parameters,
    }
    state = state_memory(config, latent_channels=channels, encoder=encoder, shards=hardware.shards, memory_bytes=hardware.memory_bytes)
    memory = Memory(
        state,
        {policy: activation_peak(config, policy) for policy in POLICIES},
        {policy: largest_micro_batch(config, policy, state=state, memory_bytes=hardware.memory_bytes) for policy in POLICIES},
    )
    vae_flops = _vae_training_flops(recipe)
    vae_hours = _gpu_hours(vae_flops, hardware)
    num_parameters = sum(parameters["mmdit"].values())
    return Cost(
        recipe.name,
        hardware,
        caption_tokens,
        parameters,
        memory,
        vae_flops,
        vae_hours,
        vae_hours / hardware.gpus / 24,
        [
            _stage_cost(recipe, name, hardware, encoder=encoder, caption_tokens=caption_tokens, num_parameters=num_parameters)
            for name in recipe.stages
        ],
    )


def sample_mix(recipe: Recipe, stage: Stage, *, caption_tokens: int) -> dict[str, list[tuple[float, Sample]]]:
    """The kinds of samples that a stage draws: by kind, shares of all samples and their tokens. Pictures are squares of the stage's side.

    Operations on edits are drawn alike; a multi-reference edit has two condition images, the others one.
    """
    side = stage.resolution_px // CompressionRatio
    edit = stage.edit_share if "edit" in stage.kinds else 0.0
    text_image = stage.text_image_share if "text_image" in stage.kinds else 0.0
    plain: Sample = (caption_tokens, (side, side))
    operations = recipe.edits.operations
    edits: list[Sample] = [(caption_tokens, *[(side, side)] * (3 if name == "multi_reference" else 2)) for name in operations]
    mix = {
        "image": [(1.0 - edit - text_image, plain)],
        "text_image": [(text_image, plain)],
        "edit": [(edit / len(edits), sample) for sample in edits],
    }
    return {kind: members for kind, members in mix.items() if sum(share for share, _ in members) > 1e-9}


def _stage_cost(
    recipe: Recipe, name: str, hardware: Hardware, *, encoder: EncoderSizes, caption_tokens: int, num_parameters: int
) -> StageCost:
    stage, channels = recipe.mmdit.stages[name], recipe.vae.model.latent_channels
    mix = sample_mix(recipe, stage, caption_tokens=caption_tokens)
    members = [member for kind in mix.values() for member in kind]
    samples = stage.steps * stage.batch_size
    tokens_a_step = round(stage.batch_size * sum(share * sum(map(num_tokens, sample)) for share, sample in members))
    forward = sum(
        share * mmdit_forward_flops(recipe.mmdit.model, [sample], latent_channels=channels, text_dim=encoder.hidden_size)
        for share, sample in members
    )
    training = training_flops(round(samples * forward))
    encoding = samples * text_encoder_flops(encoder, tokens=caption_tokens)
    hours = _gpu_hours(training + encoding, hardware)
    reads = {kind: _reads(recipe, stage, kind, of_kind, ranks=hardware.gpus) for kind, of_kind in mix.items()}
    checkpoints = (stage.steps - 1) // recipe.mmdit.checkpoint_every_steps
    return StageCost(
        name=name,
        resolution_px=stage.resolution_px,
        steps=stage.steps,
        samples=samples,
        tokens_a_step=tokens_a_step,
        tokens=tokens_a_step * stage.steps,
        longest_sample_tokens=max(sum(map(num_tokens, sample)) for _, sample in members),
        training_flops=training,
        encoder_flops=encoding,
        gpu_hours=hours,
        days=hours / hardware.gpus / 24,
        read_bytes=round(stage.steps * sum(requests * num_bytes for requests, num_bytes in reads.values())),
        read_requests=round(stage.steps * sum(requests for requests, _ in reads.values())),
        checkpoints=checkpoints,
        written_bytes=checkpoints * CHECKPOINT_BYTES * num_parameters + FP32 * num_parameters,
        write_requests=checkpoints * (hardware.gpus * _put_requests(CHECKPOINT_BYTES * num_parameters / hardware.gpus) + FIRST_RANKS_FILES)
        + _put_requests(FP32 * num_parameters),
    )


def _reads(recipe: Recipe, stage: Stage, kind: str, members: list[tuple[float, Sample]], *, ranks: int) -> tuple[float, float]:
    """Fetches of row groups for one batch's samples of a kind, and bytes a fetch."""
    share = sum(part for part, _ in members)
    pictures = sum(part * (len(sample) - 1) for part, sample in members) / share
    row_bytes = pictures * num_tokens(members[0][1][-1]) * recipe.vae.model.latent_channels * BF16
    rows = max(1, int(ROW_GROUP_BYTES // row_bytes))
    window = recipe.mmdit.window_row_groups
    return row_group_reads(samples=share * stage.batch_size, rows=rows, window=window, ranks=share * ranks), rows * row_bytes


def _put_requests(num_bytes: float) -> int:
    """Requests that store one object: one, or its parts with a beginning and an end."""
    part = S3Settings().multipart_bytes
    return 1 if num_bytes <= part else math.ceil(num_bytes / part) + 2


def _vae_training_flops(recipe: Recipe) -> float:
    """Forward and backward passes over every crop; the teacher and losses are not counted."""
    config, side = recipe.vae.model, recipe.vae.crop_px
    forward = vae_encoder_flops(config, height=side, width=side) + vae_decoder_flops(config, height=side, width=side)
    return float(training_flops(forward)) * recipe.vae.steps * recipe.vae.batch_size


def _gpu_hours(flops: float, hardware: Hardware) -> float:
    return flops / (hardware.peak_flops * hardware.mfu) / 3600
