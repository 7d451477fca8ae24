"""What a sample of the packed stream consists of, in the order in which it is read."""

from __future__ import annotations

from collections.abc import Sequence

Grid = tuple[int, int]  # a picture of so many (rows, columns) of tokens
Segment = int | Grid  # so many text tokens, or a picture
Sample = tuple[Segment, ...]  # the last segment is the target's picture


def num_tokens(segment: Segment) -> int:
    """Tokens of a segment."""
    return segment if isinstance(segment, int) else segment[0] * segment[1]


def text_runs(segments: Sequence[Segment]) -> tuple[int, ...]:
    """Lengths of the runs of text in a sample."""
    return tuple(segment for segment in segments if isinstance(segment, int))


def interleave(runs: Sequence[int], pictures: Sequence[Grid]) -> Sample:
    """A sample of `runs` of text, each before the picture of its number; pictures beyond them follow, the target last.

    So an encoder that saw the condition images, and gives a run more than there are of them, puts each at its slot; one that saw
    none gives a single run, before all pictures.
    """
    placed = [segment for run, picture in zip(runs, pictures[: len(runs)], strict=True) for segment in (run, picture)]
    return (*placed, *pictures[len(runs) :])
