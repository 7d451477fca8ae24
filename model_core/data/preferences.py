"""Preference pairs: two pictures of one prompt, and which is the better in one dimension. Parquet, a row a pair and dimension.

Columns are the fields of `Preference`; pictures are PNG files, notes a JSON object.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from model_core.data.shards import decode_image
from model_core.recipe import Dimension

FILE_NAME = "preferences.parquet"
FORMAT = "darkroom-preferences-1"
RUBRIC_VERSION = "1"
REAL = "real"  # stands where a model would be named, for pictures that none drew
ROWS_A_GROUP = 512

Label = Literal["a", "b", "tie", "invalid", "unlabelled"]
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Preference:
    """A pair in one dimension. Which picture is a and which is b is drawn at random, so that the side tells nothing.

    `sources` are an edit's condition images; pictures are encoded files. `score_a` and `score_b` are pointwise scores from 1 to 5,
    None where nobody gave one; `reason` names what made the order known (a corruption), or is `votes`. `model_*` and `seed_*` say
    what drew a picture: `real` for one of the data's. `votes` counts people's labels.
    """

    pair_id: str
    dimension: Dimension
    prompt_id: str
    prompt: str
    category: str
    image_a: bytes
    image_b: bytes
    label: Label
    reason: str
    split: Split
    sources: Sequence[bytes] = ()
    score_a: float | None = None
    score_b: float | None = None
    model_a: str = REAL
    model_b: str = REAL
    seed_a: int = 0
    seed_b: int = 0
    num_annotators: int = 0
    votes: dict[str, int] = field(default_factory=dict)
    rubric_version: str = RUBRIC_VERSION
    notes: dict[str, Any] = field(default_factory=dict)

    def pictures(self) -> tuple[Image.Image, Image.Image]:
        """a and b, decoded."""
        return decode_image(self.image_a), decode_image(self.image_b)


SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("pair_id", "dimension", "prompt_id", "prompt", "category")),
        ("image_a", pa.binary()),
        ("image_b", pa.binary()),
        *((name, pa.string()) for name in ("label", "reason", "split")),
        ("sources", pa.list_(pa.binary())),
        ("score_a", pa.float32()),
        ("score_b", pa.float32()),
        ("model_a", pa.string()),
        ("model_b", pa.string()),
        ("seed_a", pa.int64()),
        ("seed_b", pa.int64()),
        ("num_annotators", pa.int32()),
        ("votes", pa.string()),
        ("rubric_version", pa.string()),
        ("notes", pa.string()),
    ],
    metadata={"format": FORMAT},
)


def png(picture: Image.Image) -> bytes:
    """A picture as a PNG file's bytes."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def write_preferences(path: Path, preferences: Iterable[Preference]) -> int:
    """Writes pairs in their order; returns how many."""
    num = 0
    with pq.ParquetWriter(path, SCHEMA, compression="none") as writer:
        rows: list[dict[str, Any]] = []
        for preference in preferences:
            row = asdict(preference)
            rows.append(row | {name: json.dumps(row[name], sort_keys=True) for name in ("votes", "notes")})
            num += 1
            if len(rows) == ROWS_A_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
    return num


def read_preferences(path: Path, *, dimension: Dimension | None = None) -> Iterator[Preference]:
    """The pairs that `write_preferences` wrote, of one dimension or all."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            for row in file.read_row_group(group).to_pylist():
                if dimension is None or row["dimension"] == dimension:
                    yield Preference(**row | {name: json.loads(row[name]) for name in ("votes", "notes")})
