"""filter_images: which rows a stage trains on, and why the others are left out (R1 2.3, Fig. 6).

Takes the raw rows and, after the first stage, the kept rows of the stage before, which it only narrows; leaves `kept.parquet`
(the rows with a column a score) and `funnel.json`.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model_core.context import StepContext
from model_core.data.filters import COLUMNS, Look, Scores, apply, check_filters, open_nsfw_detector, score_row
from model_core.data.shards import read_kept_rows, read_rows
from model_core.documents import UserError
from model_core.recipe import Thresholds
from model_core.steps.registry import RAW

RADIUS = b"dedup_distance"  # metadata: how far duplicates were searched for
IDENTITY = pa.schema(
    [
        ("sample_id", pa.binary(16)),
        ("kind", pa.string()),
        ("held_out", pa.bool_()),
        ("input", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


def run(context: StepContext) -> dict[str, Any]:
    """Scores the rows, or takes the scores of the stage before; returns what is kept by kind, and the funnel."""
    assert context.stage is not None
    began = time.monotonic()
    check_filters(context.recipe)
    thresholds = context.recipe.mmdit.stages[context.stage].filter
    before = pq.read_table(context.inputs["previous"].path("kept.parquet")) if "previous" in context.inputs else None
    looks: list[Look | None] | None = None
    if before is not None and _scores_suffice(before, thresholds):
        rows = before.select(IDENTITY.names)
        scores = {name: before[name].to_numpy() for name in COLUMNS}
        radius = before.schema.metadata[RADIUS]
    else:
        rows, scores, looks = _score(context, thresholds, before)
        radius = str(thresholds.dedup_distance).encode()
    kept, funnel = apply(scores, thresholds, looks)
    if not kept.any():
        left = ", ".join(f"{entry['operator']} {entry['out']}" for entry in funnel)
        where = f"mmdit.stages.{context.stage}.filter"
        raise UserError(f"{where}: found no row that passes (left after each operator: {left}); allowed are looser thresholds")

    columns = {name: rows[name] for name in IDENTITY.names} | {name: pa.array(scores[name], pa.float64()) for name in COLUMNS}
    table = pa.table(columns).filter(pa.array(kept)).replace_schema_metadata({RADIUS: radius})
    pq.write_table(
        table, context.output / "kept.parquet", compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )
    (context.output / "funnel.json").write_text(json.dumps(funnel, indent=1) + "\n")
    kinds, counts = np.unique(table["kind"].to_pylist(), return_counts=True)
    return {
        "rows": table.num_rows,
        "kinds": {str(kind): int(count) for kind, count in zip(kinds, counts, strict=True)},
        "funnel": {entry["operator"]: entry["in"] - entry["out"] for entry in funnel},
        "scored": looks is not None,
        "data_seconds": round(time.monotonic() - began, 3),
    }


def _scores_suffice(before: pa.Table, thresholds: Thresholds) -> bool:
    """Whether the scores of the stage before answer all that these thresholds ask."""
    radius = before.schema.metadata[RADIUS].decode()
    searched = thresholds.dedup_distance is None or (radius != "None" and int(radius) >= thresholds.dedup_distance)
    return searched and (thresholds.max_nsfw is None or not np.isnan(before["nsfw"].to_numpy()).any())


def _score(context: StepContext, thresholds: Thresholds, before: pa.Table | None) -> tuple[pa.Table, Scores, list[Look | None]]:
    """(identity, scores, looks) of every row, input by input; of those kept before, when there are such."""
    detector = None if thresholds.max_nsfw is None else open_nsfw_detector()
    inputs = context.inputs
    total = before.num_rows if before is not None else sum(inputs[name].read_json("index.json")["rows"] for name in RAW)
    kept_before = None if before is None else inputs["previous"]
    identity: dict[str, list[Any]] = {name: [] for name in IDENTITY.names}
    scores: dict[str, list[float]] = {name: [] for name in COLUMNS}
    looks: list[Look | None] = []
    for name in RAW:
        source = {name: inputs[name]}
        for row in read_rows(inputs[name]) if kept_before is None else read_kept_rows(kept_before, source):
            scored, look = score_row(row, seed=context.recipe.seed, nsfw=detector)
            looks.append(look)
            for column in COLUMNS:
                scores[column].append(scored[column])
            for column in IDENTITY.names:
                identity[column].append(name if column == "input" else getattr(row, column))
            context.progress.update(len(looks), total, "rows scored")
    return pa.table(identity, schema=IDENTITY), {column: np.array(values) for column, values in scores.items()}, looks
