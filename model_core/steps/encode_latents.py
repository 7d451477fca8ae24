"""encode_latents: the kept rows of a stage as standardised latents, one shard a shape (R1 4.1: features are precomputed).

Takes the stage's kept rows, the captions, the VAE and the raw rows; leaves `latents/HxW-rR.parquet`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from model_core.context import StepContext
from model_core.data.buckets import bucket, fit
from model_core.data.latents import CAPTIONS, LatentShard, shard_name, write_latents
from model_core.data.pixels import image_tensor
from model_core.data.shards import RawRow, decode_image, read_kept_rows
from model_core.models.vae import ResidualVAE, load_vae

BATCH_IMAGES = 64


def run(context: StepContext) -> dict[str, Any]:
    """Encodes targets and references of every kept row of the stage's kinds; returns counts and times."""
    assert context.stage is not None
    stage = context.recipe.mmdit.stages[context.stage]
    inputs = context.inputs
    vae = load_vae(inputs["vae"].folder("vae"))
    captions = {row["sample_id"]: row for row in pq.read_table(inputs["captions"].path("captions.parquet")).to_pylist()}
    began, done = time.monotonic(), 0

    samples: dict[tuple[tuple[int, int], int], list[dict[str, Any]]] = defaultdict(list)
    total = sum(1 for kind in inputs["kept"].manifest.stats["kinds"].items() for _ in range(kind[1]) if kind[0] in stage.kinds)
    for rows in _batches(read_kept_rows(inputs["kept"], inputs, kinds=stage.kinds)):
        for shape_px, group in _by_bucket(rows, stage.resolution_px).items():
            targets = _encode(vae, [fit(decode_image(row.image), shape_px) for row in group])
            references = [[fit(decode_image(image), shape_px) for image in row.references] for row in group]
            encoded = iter(_encode(vae, [image for images in references for image in images]))
            for row, target, images in zip(group, targets, references, strict=True):
                shape = (target.shape[1], target.shape[2])
                entry = {"row": row, "latent": target, "references": [next(encoded) for _ in images], "captions": captions[row.sample_id]}
                samples[shape, len(images)].append(entry)
        done += len(rows)
        context.progress.update(done, total, "pictures encoded")

    vae_digest = inputs["vae"].manifest.content_digest
    for (shape, num_references), entries in sorted(samples.items()):
        write_latents(context.output / shard_name(shape, num_references), _shard(entries, shape, num_references), vae_digest=vae_digest)
    return {
        "rows": done,
        "shapes": {shard_name(shape, count): len(entries) for (shape, count), entries in sorted(samples.items())},
        "data_seconds": round(time.monotonic() - began, 3),
    }


def _batches(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    batch: list[RawRow] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH_IMAGES:
            yield batch
            batch = []
    if batch:
        yield batch


def _by_bucket(rows: list[RawRow], resolution_px: int) -> dict[tuple[int, int], list[RawRow]]:
    groups: dict[tuple[int, int], list[RawRow]] = defaultdict(list)
    for row in rows:
        groups[bucket(row.width, row.height, resolution_px)].append(row)
    return groups


@torch.inference_mode()
def _encode(vae: ResidualVAE, images: list[Any]) -> list[np.ndarray]:
    """Standardised latents (C, h, w) of pictures of one size."""
    if not images:
        return []
    latents = vae.standardise(vae.encode(torch.stack([image_tensor(image) for image in images])))
    return list(latents.contiguous().numpy())


def _shard(entries: list[dict[str, Any]], shape: tuple[int, int], num_references: int) -> LatentShard:
    channels = entries[0]["latent"].shape[0]
    references = np.zeros((len(entries), num_references, channels, *shape), dtype=np.float32)
    for index, entry in enumerate(entries):
        for slot, latent in enumerate(entry["references"]):
            references[index, slot] = latent
    rows: list[RawRow] = [entry["row"] for entry in entries]
    return LatentShard(
        sample_ids=[row.sample_id for row in rows],
        kinds=[row.kind for row in rows],
        held_out=[row.held_out for row in rows],
        latents=np.stack([entry["latent"] for entry in entries]),
        references=references,
        prompts={
            "instruction": [row.instruction for row in rows],
            **{name: [entry["captions"][name] for entry in entries] for name in CAPTIONS},
        },
    )
