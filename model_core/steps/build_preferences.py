"""build_preferences: pairs of pictures of one prompt, and which is the better, in five dimensions (R1: five reward models).

Takes the raw pictures and edits, the captions, the autoencoder, the encoder and the model (`earlier`: one more); leaves
`preferences.parquet` and `preferences.png`, where the better picture of a pair has a green frame. Pairs of known order are made
(model_core/data/synthetic_preferences.py), half of them seen through the autoencoder, both pictures or none; others are drawn by
the models and wait for people. Votes label any pair that they name.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from model_core.context import StepContext
from model_core.data.contact_sheet import contact_sheet
from model_core.data.corruptions import rms_difference
from model_core.data.keys import keyed_uniform
from model_core.data.known_pairs import KnownPair, preference_of
from model_core.data.preference_sheet import NUM_SHOWN, groups_of
from model_core.data.preferences import FILE_NAME, REAL, Preference, write_preferences
from model_core.data.scene_changes import MIN_DIFFERENCE
from model_core.data.skipped import Skipped
from model_core.data.synthetic_preferences import known_pairs
from model_core.data.votes import Consensus, load_votes, merge_votes, with_votes
from model_core.evaluation.drawing import Painter, open_painter, reconstruct
from model_core.evaluation.preference_subjects import Subjects, read_subjects
from model_core.evaluation.sampled_pairs import sampled_preferences
from model_core.models.mmdit import load_mmdit
from model_core.models.vae import ResidualVAE, load_vae
from model_core.recipe import DIMENSIONS, Dimension
from model_core.training.distributed import compute_device, keep_deterministic

AUTOENCODED_SHARE = 0.5
LEFT_SHARE = 0.5  # of a pair's difference, that the autoencoder must leave
BATCH_PAIRS = 128  # whose pictures go through the autoencoder together
REPEATED = "same pair as an earlier one"


def run(context: StepContext) -> dict[str, Any]:
    """Makes, draws and labels the pairs; returns counts, warnings and seconds. Raises UserError for votes that cannot be read."""
    began = time.monotonic()
    votes = merge_votes(load_votes(context.recipe, context.site))
    keep_deterministic(compute_device())
    subjects = read_subjects(context)
    vae = load_vae(context.inputs["vae"].folder("vae")).to(compute_device())
    painters = _painters(context, vae) if subjects.prompts else {}
    tally = _Tally()
    rows = tally.count(_unique(_rows(context, subjects, vae, painters), tally.skipped), votes)
    num = write_preferences(context.output / FILE_NAME, rows)
    groups, titles = groups_of(tally.shown)
    contact_sheet(groups, columns=3, titles=titles).save(context.output / "preferences.png")
    lost = sorted(pair for pair, _ in votes if pair not in tally.pairs)
    if lost:
        tally.warnings.append(f"{len(lost)} of the pairs that votes are about do not exist now (such as {lost[0]})")
    return {
        "rows": num,
        "pairs": tally.nested(),
        "votes": {"pairs": len(votes), "used": tally.num_voted, "of_pairs_that_are_gone": len(lost)},
        "warnings": subjects.warnings + tally.warnings + tally.skipped.warnings(),
        "data_seconds": round(time.monotonic() - began, 3),
    }


class _Tally:
    """What went into the file."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, str, str]] = Counter()
        self.pairs: set[str] = set()
        self.shown: dict[str, list[Preference]] = defaultdict(list)
        self.skipped = Skipped()
        self.warnings: list[str] = []
        self.num_voted = 0

    def count(self, rows: Iterator[Preference], votes: dict[tuple[str, Dimension], Consensus]) -> Iterator[Preference]:
        """The rows with people's votes, counted, the first of each dimension kept for the sheet."""
        for row in rows:
            row = with_votes(row, votes)
            self.num_voted += row.reason == "votes"
            self.counts[row.dimension, row.split, row.label, row.reason] += 1
            kind = f"{row.dimension}, {'made' if row.model_a == REAL else 'drawn by models'}"
            if len(self.shown[kind]) < NUM_SHOWN and len(row.sources) < 2 and row.pair_id not in self.pairs:
                self.shown[kind].append(row)
            self.pairs.add(row.pair_id)
            yield row

    def nested(self) -> dict[str, dict[str, dict[str, int]]]:
        """Counts by dimension, of splits, labels and reasons."""
        nested: dict[str, dict[str, Counter[str]]] = {}
        for (dimension, *values), num in sorted(self.counts.items()):
            of = nested.setdefault(dimension, {name: Counter() for name in ("split", "label", "reason")})
            for name, value in zip(("split", "label", "reason"), values, strict=True):
                of[name][value] += num
        return {dimension: {name: dict(counter) for name, counter in of.items()} for dimension, of in nested.items()}


def _unique(rows: Iterator[Preference], skipped: Skipped) -> Iterator[Preference]:
    seen: set[tuple[str, str]] = set()
    for row in rows:
        if (row.dimension, row.pair_id) in seen:
            skipped.add(REPEATED, f"{row.dimension} {row.pair_id}")
        else:
            seen.add((row.dimension, row.pair_id))
            yield row


def _rows(context: StepContext, subjects: Subjects, vae: ResidualVAE, painters: Mapping[str, Painter]) -> Iterator[Preference]:
    config, seed = context.recipe.preferences, context.recipe.seed
    total = len(DIMENSIONS) * config.num_pairs
    done = 0
    for dimension in DIMENSIONS:
        pairs = known_pairs(
            config, subjects.scenes, seed=seed, dimension=dimension, photos=subjects.photos, photo_share=subjects.photo_share
        )
        while batch := list(islice(pairs, BATCH_PAIRS)):
            for pair in _autoencoded(vae, batch, seed, dimension, done):
                yield preference_of(pair, dimension=dimension, seed=seed)
            done += len(batch)
            context.show(done, total, f"pairs of known order, {dimension}")
    num_drawn = 0

    def count(num: int) -> None:
        nonlocal num_drawn
        num_drawn += num
        context.say(f"{num_drawn}/{2 * len(subjects.prompts)} pictures drawn for people to compare")

    yield from sampled_preferences(subjects.prompts, painters, config, seed=seed, on_drawn=count)


def _autoencoded(vae: ResidualVAE, pairs: Sequence[KnownPair], seed: int, dimension: Dimension, first: int) -> list[KnownPair]:
    """The pairs, both pictures of a keyed half of them through the autoencoder.

    A pair most of whose difference the autoencoder takes away, such as a little noise, stays as it was: its order could not be seen.
    """
    chosen = [pair for index, pair in enumerate(pairs) if keyed_uniform(seed, "autoencoded", dimension, first + index) < AUTOENCODED_SHARE]
    decoded = iter(reconstruct(vae, [shown.picture for pair in chosen for shown in (pair.better, pair.worse)]))
    seen = {}
    for pair in chosen:
        better, worse = next(decoded), next(decoded)
        least = max(MIN_DIFFERENCE, LEFT_SHARE * rms_difference(pair.better.picture, pair.worse.picture))
        if pair.is_tie or rms_difference(better, worse) >= least:
            seen[id(pair)] = replace(
                pair,
                better=replace(pair.better, picture=better),
                worse=replace(pair.worse, picture=worse),
                notes=pair.notes | {"autoencoded": True},
            )
    return [seen.get(id(pair), pair) for pair in pairs]


def _painters(context: StepContext, vae: ResidualVAE) -> dict[str, Painter]:
    """The model, and the earlier one where it is given, by what decides their pictures: their digests, the autoencoder's, the encoder's."""
    inputs, recipe = context.inputs, context.recipe
    painter = open_painter(
        mmdit=inputs["model"].folder("mmdit"),
        vae=inputs["vae"].folder("vae"),
        encoder=inputs["encoder"].folder("encoder"),
        sampling=recipe.sampling,
    )
    frozen = "-".join(inputs[name].manifest.content_digest[:8] for name in ("vae", "encoder"))
    painters: dict[str, Painter] = {}
    for name in ("model", "earlier"):
        if name in inputs:
            manifest = inputs[name].manifest
            mmdit = painter.mmdit if name == "model" else load_mmdit(inputs[name].folder("mmdit")).to(compute_device()).eval()
            painters[f"{manifest.label}@{manifest.content_digest[:16]}-{frozen}"] = replace(painter, mmdit=mmdit, vae=vae)
    return painters
