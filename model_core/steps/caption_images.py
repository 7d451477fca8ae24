"""caption_images: four captions for every kept row, from its annotations (R1 2.2).

Takes the kept rows of the first stage, which hold those of all later ones, and the raw rows; leaves `captions.parquet`.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model_core.context import StepContext
from model_core.data.captions import SOURCE_MODEL, captions_of, check_captions
from model_core.data.shards import read_kept_rows
from model_core.steps.registry import RAW

CAPTIONS = ("general", "text", "knowledge", "structured")
COLUMNS = ("sample_id", "kind", "caption", "instruction", "annotation", "provenance")
SCHEMA = pa.schema([("sample_id", pa.binary(16)), *((name, pa.string()) for name in (*CAPTIONS, "language", "source_model"))])


def run(context: StepContext) -> dict[str, Any]:
    """Writes and checks the captions; returns counts by type and language, and the median length of each type in words."""
    began = time.monotonic()
    kept = context.inputs["kept"]
    total = sum(kept.manifest.stats["kinds"].values())
    rows: list[dict[str, Any]] = []
    for raw in read_kept_rows(kept, {name: context.inputs[name] for name in RAW}, columns=COLUMNS):
        captions = captions_of(raw, max_words=context.recipe.captions.max_tokens)
        check_captions(captions)
        entry = {name: getattr(captions, name) for name in (*CAPTIONS, "language")}
        rows.append({"sample_id": raw.sample_id, "source_model": SOURCE_MODEL} | entry)
        context.progress.update(len(rows), total, "rows captioned")
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(
        table,
        context.output / "captions.parquet",
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    lengths = {name: sorted(len(row[name].split()) for row in rows if row[name]) for name in CAPTIONS}
    return {
        "rows": len(rows),
        "captions": {name: len(words) for name, words in lengths.items()},
        "median_words": {name: words[len(words) // 2] for name, words in lengths.items() if words},
        "languages": dict(sorted(Counter(row["language"] for row in rows).items())),
        "data_seconds": round(time.monotonic() - began, 3),
    }
