"""encode_latents: the kept rows of a stage as standardised latents, one shard a shape (R1 4.1: features are precomputed).

Takes the stage's kept rows, the captions, the VAE, the condition encoder (for the length of each prompt) and the raw rows;
leaves latent shards in buckets and their index. Where the stage caches text states, or the encoder sees an edit's references, of
which training has no pixels, the encoder runs here too, and its states lie beside the latents.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from model_core.context import StepContext
from model_core.data.buckets import bucket, fit
from model_core.data.latents import CAPTIONS, HELD_OUT, TRAIN, Bucket, LatentRow, LatentWriter, Origin, states_by_kind
from model_core.data.pixels import image_tensor
from model_core.data.shards import RawRow, decode_image, read_kept_rows
from model_core.data.states import EMPTY, PromptStates, write_empty
from model_core.models.condition import ConditionEncoder, load_encoder
from model_core.models.segments import text_runs
from model_core.models.tiling import encode_pictures
from model_core.models.vae import ResidualVAE, load_vae
from model_core.training.distributed import compute_device, frozen_dtype

BATCH_IMAGES = 64
BATCH_PIXELS = 2048 * 2048  # at once through the autoencoder, or one picture


def run(context: StepContext) -> dict[str, Any]:
    """Encodes targets and references of every kept row of the stage's kinds; returns counts and times."""
    assert context.stage is not None
    stage = context.recipe.mmdit.stages[context.stage]
    inputs = context.inputs
    device = compute_device()
    vae = load_vae(inputs["vae"].folder("vae")).to(device)
    encoder = load_encoder(inputs["encoder"].folder("encoder"), dtype=frozen_dtype(device)).to(device)
    captions = {row["sample_id"]: row for row in pq.read_table(inputs["captions"].path("captions.parquet")).to_pylist()}
    began, done = time.monotonic(), 0

    origin = Origin(vae=inputs["vae"].manifest.content_digest, encoder=inputs["encoder"].manifest.content_digest)
    stored = states_by_kind(stage.kinds, cache_states=stage.cache_states, sees_images=encoder.sees_images)
    writer = LatentWriter(context.output, origin=origin, channels=vae.config.latent_channels, states=stored, text_dim=encoder.dim)
    if stored:
        write_empty(context.output, encoder.encode_packed([""]).states.cpu())
    total = sum(count for kind, count in inputs["kept"].manifest.stats["kinds"].items() if kind in stage.kinds)
    for rows in _batches(read_kept_rows(inputs["kept"], inputs, kinds=stage.kinds)):
        for shape_px, group in _by_bucket(rows, stage.resolution_px, encoder.multiple_px).items():
            targets = _encode(vae, [image_tensor(fit(decode_image(row.image), shape_px)) for row in group])
            references = [[image_tensor(fit(decode_image(image), shape_px)) for image in row.references] for row in group]
            encoded = iter(_encode(vae, [reference for images in references for reference in images]))
            prompts = [{"instruction": row.instruction, **{name: captions[row.sample_id][name] for name in CAPTIONS}} for row in group]
            names = [stored.get(row.kind, ()) for row in group]
            states = _states(encoder, prompts, references, names)
            for row, target, words, found in zip(group, targets, prompts, states, strict=True):
                bucket = Bucket(HELD_OUT if row.held_out else TRAIN, row.kind, target.shape[1], target.shape[2], len(row.references))
                num_images = len(row.references) if encoder.sees_images else 0
                tokens = {
                    name: encoder.num_tokens(prompt, num_images=num_images * (name == "instruction")) for name, prompt in words.items()
                }
                writer.add(
                    bucket,
                    LatentRow(
                        sample_id=row.sample_id,
                        latent=target,
                        references=[next(encoded) for _ in row.references],
                        prompts=words,
                        prompt_tokens=tokens,
                        states=found,
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


def _by_bucket(rows: list[RawRow], resolution_px: int, multiple_px: int) -> dict[tuple[int, int], list[RawRow]]:
    groups: dict[tuple[int, int], list[RawRow]] = defaultdict(list)
    for row in rows:
        groups[bucket(row.width, row.height, resolution_px, multiple_px=multiple_px)].append(row)
    return groups


@torch.inference_mode()
def _encode(vae: ResidualVAE, images: list[Tensor]) -> list[Tensor]:
    """Standardised latents (C, h, w) of pictures (3, H, W) of one size."""
    if not images:
        return []
    batch = max(1, BATCH_PIXELS // images[0][0].numel())
    latents: list[Tensor] = []
    for start in range(0, len(images), batch):
        part = torch.stack(images[start : start + batch]).to(vae.latent_mean.device)
        latents += list(vae.standardise(encode_pictures(vae, part)).contiguous().cpu())
    return latents


def _states(
    encoder: ConditionEncoder, prompts: Sequence[dict[str, str]], references: Sequence[list[Tensor]], names: Sequence[Sequence[str]]
) -> list[dict[str, PromptStates]]:
    """The text states of each row's prompts of `names` that it has; an encoder that sees images is shown the row's references."""
    found: list[dict[str, PromptStates]] = [{} for _ in names]
    places = [(number, name) for number, row in enumerate(names) for name in row if name == EMPTY or prompts[number][name]]
    if not places:
        return found
    texts = ["" if name == EMPTY else prompts[number][name] for number, name in places]
    packed = encoder.encode_packed(texts, [references[number] if encoder.sees_images else [] for number, _ in places])
    for (number, name), states, segments in zip(places, packed.split(), packed.segments, strict=True):
        found[number][name] = PromptStates(states.to("cpu", torch.bfloat16), text_runs(segments))
    return found
