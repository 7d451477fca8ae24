"""Small data sets of latents for tests: random latents, ids that tell kind and number."""

from __future__ import annotations

from pathlib import Path

import torch

from model_core.data.index import Index
from model_core.data.latents import CAPTIONS, HELD_OUT, PROMPTS, TRAIN, Bucket, LatentRow, LatentWriter, Origin
from model_core.recipe import MMDiTModel

MODEL = MMDiTModel(num_layers=1, num_heads=1, head_dim=8, rope_axes=(2, 4, 2))

ORIGIN = Origin(vae="a" * 64, encoder="b" * 64)
CHANNELS = 4


def sample_id(kind: str, number: int) -> bytes:
    """The id of a kind's sample."""
    return kind.encode().ljust(8, b"-")[:8] + number.to_bytes(8, "big")


def row(kind: str, number: int, *, shape: tuple[int, int] = (2, 3), num_references: int = 0) -> LatentRow:
    """A row whose latent is drawn from its number and whose captions name it."""
    generator = torch.Generator().manual_seed(number)
    prompts = {"instruction": f"change {number}" if kind == "edit" else "", **{name: f"{name} {number}" for name in CAPTIONS}}
    return LatentRow(
        sample_id=sample_id(kind, number),
        latent=torch.randn(CHANNELS, *shape, generator=generator),
        references=[torch.randn(CHANNELS, *shape, generator=generator) for _ in range(num_references)],
        prompts=prompts,
        prompt_tokens=dict.fromkeys(PROMPTS, 1 + number % 7),
    )


def write_latents(
    root: Path,
    sizes: dict[str, int],
    *,
    rows_a_group: int = 4,
    shapes: tuple[tuple[int, int], ...] = ((2, 3),),
    held_out: int = 0,
    origin: Origin = ORIGIN,
) -> Index:
    """`sizes` rows a kind, dealt out over `shapes`; edits have one reference; the last `held_out` of a kind are held out."""
    root.mkdir(parents=True, exist_ok=True)
    writer = LatentWriter(root, origin=origin, channels=CHANNELS)
    for kind, size in sizes.items():
        for number in range(size):
            shape, references = shapes[number % len(shapes)], 1 if kind == "edit" else 0
            bucket = Bucket(HELD_OUT if number >= size - held_out else TRAIN, kind, *shape, references)
            writer.add(bucket, row(kind, number, shape=shape, num_references=references))
            if len(writer._rows[bucket]) == rows_a_group:  # groups of this size instead of 16 MiB
                writer._flush(bucket)
    return writer.close()
