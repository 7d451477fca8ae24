"""Text states beside latents, so that training need not run the condition encoder: of its prompts, or of edits it has seen.

A row's states of a prompt are those of its text tokens, bfloat16. Where the encoder sees an edit's references, the tokens come
in runs, between which the references' latents belong. docs/reference/shards.md lists the columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_core.data.folders import Folder

EMPTY = "empty"  # no prompt, but the row's references: what an edit whose prompt is dropped is conditioned on
EMPTY_FILE = "empty.safetensors"


@dataclass(frozen=True)
class PromptStates:
    """`states` (L, dim) bfloat16 of one prompt, in `runs` that sum to L: reference k lies between run k and run k + 1."""

    states: Tensor
    runs: tuple[int, ...]


@dataclass(frozen=True)
class StoredStates:
    """The states of one prompt type in a row group: `values` (T, dim) bfloat16 as uint16, row n's from `ends[n]` to `ends[n + 1]`."""

    values: np.ndarray
    ends: np.ndarray
    runs: np.ndarray | None  # (N, references + 1); None where each row is one run

    def row(self, number: int) -> PromptStates:
        """The states of a row; always a copy."""
        values = self.values[self.ends[number] : self.ends[number + 1]].astype(np.int16)
        runs = (len(values),) if self.runs is None else tuple(self.runs[number].tolist())
        return PromptStates(torch.from_numpy(values).view(torch.bfloat16), runs)


def state_fields(names: Sequence[str], num_references: int) -> list[tuple[str, pa.DataType]]:
    """The columns of the states of `names`; runs are there only where the encoder saw the references."""
    runs = EMPTY in names
    return [
        field
        for name in names
        for field in [(f"{name}_states", pa.binary()), *([(f"{name}_runs", pa.list_(pa.int16(), num_references + 1))] if runs else [])]
    ]


def state_columns(names: Sequence[str], rows: Sequence[Mapping[str, PromptStates]], num_references: int) -> dict[str, list[object]]:
    """Values of those columns; a row without a prompt of a name holds no bytes there."""
    columns: dict[str, list[object]] = {}
    for name in names:
        columns[f"{name}_states"] = [bfloat16_bytes(row[name].states) if name in row else b"" for row in rows]
        columns[f"{name}_runs"] = [list(row[name].runs) if name in row else [0] * (num_references + 1) for row in rows]
    return columns


def read_states(table: pa.Table, names: Sequence[str], dim: int) -> dict[str, StoredStates]:
    """The states that a table holds, by prompt type; views of its memory where a column lies in one piece."""
    found = {}
    for name in names:
        column = table[f"{name}_states"]
        array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
        _, offsets, data = array.buffers()
        ends = np.frombuffer(offsets, dtype="<i4")[array.offset : array.offset + len(array) + 1] // (2 * dim)
        values = np.frombuffer(data if data is not None else b"", dtype="<u2", count=int(ends[-1]) * dim).reshape(-1, dim)
        runs = None
        if f"{name}_runs" in table.column_names:
            runs = np.array(table[f"{name}_runs"].to_pylist(), dtype=np.int64).reshape(len(table), -1)
        found[name] = StoredStates(values, ends, runs)
    return found


def write_empty(root: Path, states: Tensor) -> None:
    """Leaves the states (L, dim) of no prompt without images, one for all rows, beside the shards."""
    save_file({"states": states.to(torch.bfloat16).contiguous()}, root / EMPTY_FILE)


def read_empty(folder: Folder) -> PromptStates:
    """What `write_empty` left: the states that a text-to-image sample whose prompt is dropped is conditioned on."""
    states = load_file(folder.path(EMPTY_FILE))["states"]
    return PromptStates(states, (len(states),))


def bfloat16_bytes(values: Tensor) -> bytes:
    """The values in order, bfloat16, little-endian."""
    return bytes(values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().astype("<i2", copy=False).tobytes())
