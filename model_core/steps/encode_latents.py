"""encode_latents: the kept rows of a stage as standardised latents, one shard a shape (R1 4.1: features are precomputed).

Takes the stage's kept rows, the captions, the VAE, the condition encoder (for the length of each prompt) and the raw rows;
leaves latent shards in buckets and their index.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from model_core.context import StepContext
from model_core.data.buckets import bucket, fit
from model_core.data.latents import CAPTIONS, HELD_OUT, TRAIN, Bucket, LatentRow, LatentWriter, Origin
from model_core.data.pixels import image_tensor
from model_core.data.shards import RawRow, decode_image, read_kept_rows
from model_core.models.condition import load_encoder
from model_core.models.tiling import encode_pictures
from model_core.models.vae import ResidualVAE, load_vae

BATCH_IMAGES = 64
BATCH_PIXELS = 2048 * 2048  # at once through the autoencoder, or one picture


def run(context: StepContext) -> dict[str, Any]:
    """Encodes targets and references of every kept row of the stage's kinds; returns counts and times."""
    assert context.stage is not None
    stage = context.recipe.mmdit.stages[context.stage]
    inputs = context.inputs
    vae = load_vae(inputs["vae"].folder("vae"))
    encoder = load_encoder(inputs["encoder"].folder("encoder"))
    captions = {row["sample_id"]: row for row in pq.read_table(inputs["captions"].path("captions.parquet")).to_pylist()}
    began, done = time.monotonic(), 0

    origin = Origin(vae=inputs["vae"].manifest.content_digest, encoder=inputs["encoder"].manifest.content_digest)
    writer = LatentWriter(context.output, origin=origin, channels=vae.config.latent_channels)
    total = sum(count for kind, count in inputs["kept"].manifest.stats["kinds"].items() if kind in stage.kinds)
    for rows in _batches(read_kept_rows(inputs["kept"], inputs, kinds=stage.kinds)):
        for shape_px, group in _by_bucket(rows, stage.resolution_px).items():
            targets = _encode(vae, [fit(decode_image(row.image), shape_px) for row in group])
            encoded = iter(_encode(vae, [fit(decode_image(image), shape_px) for row in group for image in row.references]))
            for row, target in zip(group, targets, strict=True):
                bucket = Bucket(HELD_OUT if row.held_out else TRAIN, row.kind, target.shape[1], target.shape[2], len(row.references))
                prompts = {"instruction": row.instruction, **{name: captions[row.sample_id][name] for name in CAPTIONS}}
                writer.add(
                    bucket,
                    LatentRow(
                        sample_id=row.sample_id,
                        latent=target,
                        references=[next(encoded) for _ in row.references],
                        prompts=prompts,
                        prompt_tokens={name: encoder.num_tokens(prompt) for name, prompt in prompts.items()},
                    ),
                )
        done += len(rows)
        context.progress.update(done, total, "pictures encoded")
    index = writer.close()
    return {
        "rows": done,
        "row_groups": len(index),
        "index": index.digest,
        "buckets": {bucket: int(index.rows[index.in_buckets([bucket])].sum()) for bucket in index.buckets},
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
def _encode(vae: ResidualVAE, images: list[Image.Image]) -> list[Tensor]:
    """Standardised latents (C, h, w) of pictures of one size."""
    if not images:
        return []
    batch = max(1, BATCH_PIXELS // (images[0].width * images[0].height))
    latents = []
    for start in range(0, len(images), batch):
        part = torch.stack([image_tensor(image) for image in images[start : start + batch]])
        latents += list(vae.standardise(encode_pictures(vae, part)).contiguous())
    return latents
