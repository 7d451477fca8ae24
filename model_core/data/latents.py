"""Latent shards: what train_mmdit reads. One bucket a shard, so that a batch of it needs no padding of pictures.

A bucket is a split (train or held_out), a kind, a shape and a number of references. Latents are standardised and stored as
bfloat16, whose rounding (2^-9) lies far below what the autoencoder loses. Text states may lie beside them (model_core/data/states.py).
docs/reference/shards.md lists the columns.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from model_core.data.folders import Folder
from model_core.data.index import Index, read_index, write_index
from model_core.data.plan import Rows
from model_core.data.shard_writer import ROW_GROUP_BYTES, ShardWriter
from model_core.data.states import EMPTY, PromptStates, StoredStates, bfloat16_bytes, read_states, state_columns, state_fields
from model_core.documents import UserError

FORMAT = "darkroom-latents-2"
FORMAT_WITH_STATES = "darkroom-latents-3"  # the same, and columns of text states; shards without any keep format and bytes
CAPTIONS = ("general", "text", "knowledge", "structured")
PROMPTS = ("instruction", *CAPTIONS)
TRAIN, HELD_OUT = "train", "held_out"
_BUCKET = re.compile(rf"({TRAIN}|{HELD_OUT})/([a-z_]+)/(\d+)x(\d+)-r(\d+)")


@dataclass(frozen=True, order=True)
class Bucket:
    """What the rows of a shard have in common; `height` and `width` are rows and columns of a latent."""

    split: str
    kind: str
    height: int
    width: int
    num_references: int

    def __str__(self) -> str:
        return f"{self.split}/{self.kind}/{self.height}x{self.width}-r{self.num_references}"

    @property
    def image_tokens(self) -> int:
        """Tokens of the target and the references: one a latent place."""
        return self.height * self.width * (1 + self.num_references)


def parse_bucket(name: str) -> Bucket:
    """The bucket that `str` gave."""
    match = _BUCKET.fullmatch(name)
    if match is None:
        raise UserError(f"latents: found bucket {name!r}; allowed are names such as train/image/16x16-r0")
    return Bucket(match[1], match[2], *(int(number) for number in match.groups()[2:]))


@dataclass(frozen=True)
class Origin:
    """Digests of the models that a shard was made with: latents and token counts mean nothing to others."""

    vae: str | None
    encoder: str


@dataclass(frozen=True, kw_only=True)
class LatentRow:
    """One sample: `latent` (C, h, w) and `references`, R of (C, h, w); its prompts by name, and how many tokens each has.

    `states` are those of prompts, by name, where the writer stores them.
    """

    sample_id: bytes
    latent: Tensor
    references: Sequence[Tensor]
    prompts: dict[str, str]
    prompt_tokens: dict[str, int]
    states: Mapping[str, PromptStates] = field(default_factory=dict)


@dataclass(frozen=True)
class LatentGroup:
    """A row group in memory: `latents` (N, C, h, w) and `references` (N, R, C, h, w) bfloat16 as uint16; N prompts a name.

    `states[name].row(n)` are the text states of row n's prompt, for the names whose states are stored.
    """

    bucket: Bucket
    sample_ids: list[bytes]
    latents: np.ndarray
    references: np.ndarray
    prompts: dict[str, list[str]] = field(repr=False)
    prompt_tokens: dict[str, np.ndarray]
    states: dict[str, StoredStates] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.sample_ids)


def states_by_kind(kinds: Sequence[str], *, cache_states: bool, sees_images: bool) -> dict[str, tuple[str, ...]]:
    """Which prompts' states a stage's latents must hold, by kind; a kind that needs none is left out.

    An encoder that sees images must have run on edits beforehand: training has latents of their references, and no pixels.
    """
    names: dict[str, tuple[str, ...]] = {}
    for kind in kinds:
        if kind == "edit" and sees_images:
            names[kind] = ("instruction", EMPTY)
        elif cache_states:
            names[kind] = ("instruction",) if kind == "edit" else CAPTIONS
    return names


class LatentWriter:
    """Writes rows of any bucket below `root`; memory holds at most one row group a bucket.

    `states` names the prompts whose text states are stored, by kind; they have `text_dim` channels.
    """

    def __init__(
        self, root: Path, *, origin: Origin, channels: int, states: Mapping[str, Sequence[str]] | None = None, text_dim: int = 0
    ) -> None:
        self._root, self._origin, self._channels = root, origin, channels
        self._states, self._text_dim = states or {}, text_dim
        self._writers: dict[Bucket, ShardWriter] = {}
        self._rows: dict[Bucket, list[LatentRow]] = defaultdict(list)
        self._bytes: dict[Bucket, int] = defaultdict(int)

    def add(self, bucket: Bucket, row: LatentRow) -> None:
        """Takes one row of a bucket."""
        num_bytes = 2 * self._channels * bucket.image_tokens + sum(2 * states.states.numel() for states in row.states.values())
        self._rows[bucket].append(row)
        self._bytes[bucket] += num_bytes
        if self._bytes[bucket] + num_bytes > ROW_GROUP_BYTES:
            self._flush(bucket)

    def close(self) -> Index:
        """Writes what is left, and the index."""
        for bucket in sorted(bucket for bucket, rows in self._rows.items() if rows):
            self._flush(bucket)
        return write_index(self._root, [group for bucket in sorted(self._writers) for group in self._writers[bucket].close()])

    def _flush(self, bucket: Bucket) -> None:
        rows, num_bytes = self._rows.pop(bucket), self._bytes.pop(bucket)
        names = self._states.get(bucket.kind, ())
        schema = latent_schema(bucket, self._channels, self._origin, states=names, text_dim=self._text_dim)
        if bucket not in self._writers:
            self._writers[bucket] = ShardWriter(self._root, f"latents/{bucket}", schema, bucket=str(bucket))
        columns: dict[str, list[object]] = {
            "sample_id": [row.sample_id for row in rows],
            "latent": [bfloat16_bytes(row.latent) for row in rows],
            "references": [b"".join(bfloat16_bytes(latent) for latent in row.references) for row in rows],
            **{name: [row.prompts[name] for row in rows] for name in PROMPTS},
            **{f"{name}_tokens": [row.prompt_tokens[name] for row in rows] for name in PROMPTS},
            **state_columns(names, [row.states for row in rows], bucket.num_references),
        }
        table = pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names}, schema=schema)
        self._writers[bucket].write(table, num_bytes)


def latent_schema(bucket: Bucket, channels: int, origin: Origin, *, states: Sequence[str] = (), text_dim: int = 0) -> pa.Schema:
    """Columns and metadata of a bucket's shards; `references` and text states are there only where there are some."""
    latent = 2 * channels * bucket.height * bucket.width
    fields = [("sample_id", pa.binary(16)), ("latent", pa.binary(latent))]
    fields += [("references", pa.binary(latent * bucket.num_references))] if bucket.num_references else []
    fields += [(name, pa.string()) for name in PROMPTS]
    fields += [(f"{name}_tokens", pa.int16()) for name in PROMPTS]
    fields += state_fields(states, bucket.num_references)
    metadata = {"format": FORMAT, "bucket": str(bucket), "channels": str(channels), "vae": origin.vae or "", "encoder": origin.encoder}
    if states:
        metadata |= {"format": FORMAT_WITH_STATES, "states": ",".join(states), "text_dim": str(text_dim)}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields], metadata=metadata)


def latent_group(table: pa.Table, where: str) -> LatentGroup:
    """A row group of a latent shard; raises UserError, naming `where`, for another format."""
    metadata = _metadata(table.schema.metadata, where)
    bucket, channels = parse_bucket(metadata["bucket"]), int(metadata["channels"])
    shape = (channels, bucket.height, bucket.width)
    references = np.zeros((len(table), 0, *shape), dtype=np.uint16)
    return LatentGroup(
        bucket=bucket,
        sample_ids=table["sample_id"].to_pylist(),
        latents=_fixed(table["latent"]).reshape(len(table), *shape),
        references=_fixed(table["references"]).reshape(len(table), -1, *shape) if bucket.num_references else references,
        prompts={name: table[name].to_pylist() for name in PROMPTS},
        prompt_tokens={name: table[f"{name}_tokens"].to_numpy() for name in PROMPTS},
        states=read_states(table, _stored(metadata), int(metadata.get("text_dim", 0))),
    )


def open_latents(folder: Folder, *, origin: Origin, states: Mapping[str, Sequence[str]] | None = None) -> tuple[Index, Origin, int]:
    """The index of a data set of latents, what they were made with, and their channels.

    Raises UserError when there is nothing in it, a shard was made with another condition encoder or VAE than `origin` says (a VAE
    of None is any, but one for all shards), or a shard lacks text states that `states` names for its kind.
    """
    index = read_index(folder)
    root = folder.path("index.json").parent
    if not len(index):
        raise UserError(f"{root / 'index.json'}: found no latents; allowed is at least one row to train on")
    channels, vae = 0, origin.vae
    for path in index.paths:
        metadata = _metadata(pq.read_metadata(pa.BufferReader(index.footer(path))).metadata, str(root / path))
        channels, vae = int(metadata["channels"]), vae or metadata["vae"]
        for what, found, allowed in (("condition encoder", metadata["encoder"], origin.encoder), ("VAE", metadata["vae"], vae)):
            if found != allowed:
                raise UserError(f"{root / path}: made with {what} {found[:12]}; allowed here is {str(allowed)[:12]}")
        missing = set((states or {}).get(parse_bucket(metadata["bucket"]).kind, ())) - set(_stored(metadata))
        if missing:
            raise UserError(f"{root / path}: found no text states of {', '.join(sorted(missing))}; this stage trains on stored ones")
    return index, Origin(vae, origin.encoder), channels


def _metadata(metadata: dict[bytes, bytes] | None, where: str) -> dict[str, str]:
    decoded = {name.decode(): value.decode() for name, value in (metadata or {}).items() if name != b"ARROW:schema"}
    if decoded.get("format") not in (FORMAT, FORMAT_WITH_STATES):
        raise UserError(f"{where}: found shard format {decoded.get('format')!r}; allowed are {FORMAT!r} and {FORMAT_WITH_STATES!r}")
    return decoded


def _stored(metadata: dict[str, str]) -> list[str]:
    """Names of the prompts whose text states a shard holds."""
    return metadata["states"].split(",") if "states" in metadata else []


def latent_rows(index: Index, *, kinds: Sequence[str], split: str = TRAIN) -> dict[str, Rows]:
    """The row groups of a split, by kind."""
    buckets = [parse_bucket(name) for name in index.buckets]
    groups = {kind: index.in_buckets([str(b) for b in buckets if (b.split, b.kind) == (split, kind)]) for kind in kinds}
    return {kind: Rows(numbers, index.rows[numbers]) for kind, numbers in groups.items()}


def floats(values: np.ndarray) -> Tensor:
    """bfloat16 values, held as uint16, as a float32 tensor of the same shape; always a copy."""
    return torch.from_numpy(values.astype(np.int16)).view(torch.bfloat16).float()


def _fixed(column: pa.ChunkedArray) -> np.ndarray:
    """The bytes of a fixed-size binary column as uint16, without a copy where it lies in one piece."""
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    width = array.type.byte_width
    start = array.offset * width
    return np.frombuffer(array.buffers()[1], dtype="<u2", count=len(array) * width // 2, offset=start)
