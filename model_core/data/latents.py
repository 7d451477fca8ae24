"""Latent shards: what train_mmdit reads. One parquet file a shape, so that a batch of it needs no padding of pictures.

Columns: `sample_id` 16 bytes; `kind`; `held_out`; `latent` float32 (C, h, w) and `references` float32 (R, C, h, w) as raw
standardised latents; the prompts as text, `instruction` for edits and one column a caption type for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model_core.recipe import UserError

FORMAT = b"darkroom-latents-1"
CAPTIONS = ("general", "text", "knowledge", "structured")


@dataclass(frozen=True)
class LatentShard:
    """All samples of one shape: `latents` (N, C, h, w) and `references` (N, R, C, h, w) float32; `prompts` has N entries a column."""

    sample_ids: Sequence[bytes]
    kinds: Sequence[str]
    held_out: Sequence[bool]
    latents: np.ndarray
    references: np.ndarray
    prompts: dict[str, Sequence[str]]

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a latent."""
        return self.latents.shape[2], self.latents.shape[3]


def shard_name(shape: tuple[int, int], num_references: int) -> str:
    """File name of the shard that holds one shape."""
    return f"latents/{shape[0]}x{shape[1]}-r{num_references}.parquet"


def write_latents(path: Path, shard: LatentShard, *, vae_digest: str) -> None:
    """Writes one shard; equal content gives equal bytes."""
    channels, height, width = shard.latents.shape[1:]
    table = pa.table(
        {
            "sample_id": pa.array(list(shard.sample_ids), pa.binary(16)),
            "kind": pa.array(list(shard.kinds), pa.string()),
            "held_out": pa.array(list(shard.held_out), pa.bool_()),
            "latent": _fixed(shard.latents),
            "references": _fixed(shard.references),
            **{name: pa.array(list(values), pa.string()) for name, values in shard.prompts.items()},
        }
    )
    shape = f"{channels}x{height}x{width}x{shard.references.shape[1]}"
    table = table.replace_schema_metadata({"format": FORMAT, "vae": vae_digest, "shape": shape})
    path.parent.mkdir(parents=True, exist_ok=True)
    row_bytes = shard.latents[0].nbytes + shard.references[0].nbytes
    pq.write_table(
        table,
        path,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        row_group_size=max(1, 2**24 // row_bytes),
    )


def read_latents(path: Path, *, vae_digest: str | None = None) -> LatentShard:
    """Reads one shard, checking its page checksums; raises UserError when it was made with another VAE."""
    table = pq.read_table(path, page_checksum_verification=True)
    metadata = table.schema.metadata or {}
    if metadata.get(b"format") != FORMAT:
        raise UserError(f"{path}: found shard format {metadata.get(b'format')!r}; allowed is {FORMAT!r}")
    if vae_digest is not None and metadata[b"vae"].decode() != vae_digest:
        raise UserError(f"{path}: made with VAE {metadata[b'vae'].decode()[:12]}; allowed here is {vae_digest[:12]}")
    channels, height, width, num_references = (int(part) for part in metadata[b"shape"].decode().split("x"))
    return LatentShard(
        sample_ids=table["sample_id"].to_pylist(),
        kinds=table["kind"].to_pylist(),
        held_out=table["held_out"].to_pylist(),
        latents=_array(table["latent"], (channels, height, width)),
        references=_array(table["references"], (num_references, channels, height, width)),
        prompts={name: table[name].to_pylist() for name in table.column_names if name in (*CAPTIONS, "instruction")},
    )


def _fixed(values: np.ndarray) -> pa.Array:
    """(N, ...) float32 as N binary values of equal size; a row without values is an empty one."""
    rows = np.ascontiguousarray(values, dtype="<f4").reshape(len(values), -1)
    return pa.array([row.tobytes() for row in rows], pa.binary(rows.shape[1] * 4) if rows.shape[1] else pa.binary())


def _array(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(b"".join(column.to_pylist()), dtype="<f4").reshape(len(column), *shape)
