"""Votes: what is refused and how it is said, how several people's votes become one label, and that they are part of the step's key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from model_core.data.preferences import Preference, png
from model_core.data.votes import Vote, load_votes, merge_votes, parse_votes, vote_line, with_votes
from model_core.documents import UserError
from model_core.outside import outside_fingerprint
from model_core.recipe import Recipe
from model_core.site import Site
from model_core.steps.registry import STEPS
from pipelines.run import check_inputs

VOTE = Vote(
    pair_id="p",
    dimension="alignment",
    label="a",
    annotator="ann",
    scores=None,
    rubric_version="1",
    reason=None,
    time="2026-11-21T09:30:00+00:00",
)


def votes(*labels: str) -> list[Vote]:
    """One vote a person."""
    return [replace(VOTE, label=label, annotator=f"person {index}") for index, label in enumerate(labels)]  # type: ignore[arg-type]


def recipe(*files: str) -> Recipe:
    return Recipe.model_validate({"name": "x", "mmdit": {"stages": {"S1": {}}}, "preferences": {"votes": list(files)}})


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("a", "a"),
        ("b", "b"),
        ("tie", "tie"),
        ("invalid", "invalid"),
        ("a a b", "a"),
        ("a b", "tie"),
        ("b a", "tie"),
        ("a a b b tie", "tie"),
        ("a tie", "tie"),
        ("a tie tie", "tie"),
        ("a invalid", "a"),
        ("a b invalid invalid", "tie"),
        ("a invalid invalid", "invalid"),
        ("b b invalid", "b"),
    ],
)
def test_label_of_several_people(labels: str, expected: str) -> None:
    (consensus,) = merge_votes(votes(*labels.split())).values()
    assert consensus.label == expected
    assert consensus.num_annotators == sum(consensus.counts.values()) == len(labels.split())


@pytest.mark.parametrize("labels", ["a", "a a b", "a b", "a tie", "tie invalid", "a b b invalid"])
def test_swapping_a_and_b_in_every_vote_swaps_the_label(labels: str) -> None:
    swapped = {"a": "b", "b": "a"}
    (one,), (other,) = (
        merge_votes(votes(*names)).values() for names in (labels.split(), [swapped.get(label, label) for label in labels.split()])
    )
    assert other.label == swapped.get(one.label, one.label)


def test_the_last_vote_of_a_person_counts_and_dimensions_are_apart() -> None:
    cast = [VOTE, replace(VOTE, dimension="aesthetics", label="tie"), replace(VOTE, label="b"), replace(VOTE, annotator="bob", label="b")]
    merged = merge_votes(cast)
    assert merged["p", "alignment"].counts == {"b": 2}
    assert merged["p", "aesthetics"].label == "tie"


def test_scores_are_means_over_those_who_gave_some() -> None:
    cast = votes("a", "a", "b", "invalid")
    cast[0], cast[1] = replace(cast[0], scores={"a": 5, "b": 2}), replace(cast[1], scores={"a": 4, "b": 1})
    cast[3] = replace(cast[3], scores={"a": 1, "b": 1})
    (consensus,) = merge_votes(cast).values()
    assert (consensus.score_a, consensus.score_b) == (4.5, 1.5)


def test_votes_go_to_the_pair_and_dimension_that_they_name_and_keep_known_scores() -> None:
    picture = png(Image.new("RGB", (8, 8)))
    pair = Preference(
        pair_id="p", dimension="alignment", prompt_id="q", prompt="x", category="scene", image_a=picture, image_b=picture, label="b",
        reason="wrong_color", split="test", score_a=3.0, score_b=5.0,
    )  # fmt: skip
    labelled = with_votes(pair, merge_votes([VOTE]))
    assert (labelled.label, labelled.reason, labelled.votes, labelled.score_a) == ("a", "votes", {"a": 1}, 3.0)
    for other in (replace(pair, pair_id="o"), replace(pair, dimension="aesthetics")):
        assert with_votes(other, merge_votes([VOTE])) == other


def test_a_file_of_votes_reads_back_as_it_was_written() -> None:
    cast = [VOTE, replace(VOTE, label="invalid", reason="blank"), replace(VOTE, scores={"a": 1, "b": 5}, annotator="Åsa")]
    assert parse_votes(b"\n".join(vote_line(vote) for vote in cast), "here") == cast


def line(**changes: Any) -> bytes:
    return vote_line(replace(VOTE, **changes))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b"{", "line 2: not JSON"),
        (b"[1]", "line 2: found list; allowed are a vote's fields pair_id, dimension, label"),
        (b'{"pair_id": "p"}', "line 2: found 'pair_id'; allowed are a vote's fields"),
        (line(label="c"), "line 2: label: found 'c'; allowed are a, b, tie, invalid"),
        (line(label="unlabelled"), "line 2: label: found 'unlabelled'"),
        (line(dimension="beauty"), "line 2: dimension: found 'beauty'; allowed are aesthetics, "),
        (line(scores={"a": 0, "b": 3}), "line 2: scores: found {'a': 0, 'b': 3}; allowed are whole numbers a and b from 1 to 5"),
        (line(scores={"a": 6, "b": 3}), "line 2: scores: "),
        (line(scores={"a": True, "b": 3}), "line 2: scores: "),
        (line(scores={"a": 2.5, "b": 3}), "line 2: scores: "),
        (line(scores={"a": 2}), "line 2: scores: "),
        (line(scores=4), "line 2: scores: "),
        (line(rubric_version="0"), "line 2: rubric_version: found '0'; allowed are 1"),
        (line(annotator=""), "line 2: annotator: found ''; allowed is a text"),
        (line(pair_id=7), "line 2: pair_id: found 7; allowed is a text"),
        (line(reason=3), "line 2: reason: found 3; allowed is a text or null"),
    ],
)
def test_a_bad_line_is_refused_with_its_file_and_number(bad: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    file.write_bytes(vote_line(VOTE) + bad + b"\n")
    with pytest.raises(UserError) as refused:
        load_votes(recipe(str(file)), Site(workspace=str(tmp_path)))
    assert str(refused.value).startswith(f"preferences.votes: {file}: {words}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("nowhere.jsonl", "found 'nowhere.jsonl'; allowed are an absolute path"),
        ("/no/such.jsonl", "/no/such.jsonl: no such file"),
    ],
)
def test_a_file_that_cannot_be_found_is_refused(uri: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"preferences.votes: {words}"):
        load_votes(recipe(uri), Site(workspace=str(tmp_path)))


def test_the_key_of_the_step_changes_with_what_the_files_hold_and_with_nothing_else(tmp_path: Path) -> None:
    file, site, spec = tmp_path / "votes.jsonl", Site(workspace=str(tmp_path)), STEPS["build_preferences"]
    file.write_bytes(vote_line(VOTE))
    for uri in (str(file), file.as_uri()):
        before = outside_fingerprint(spec, recipe(uri), site)
        file.touch()
        assert outside_fingerprint(spec, recipe(uri), site) == before
        file.write_bytes(file.read_bytes() + vote_line(replace(VOTE, label="b")))
        assert outside_fingerprint(spec, recipe(uri), site) != before
    assert outside_fingerprint(spec, recipe(), site) is None
    assert outside_fingerprint(STEPS["train_reward"], recipe(str(file)), site) is None


def test_a_run_does_not_start_with_votes_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="preferences.votes: .*gone.jsonl: no such file"):
        check_inputs(recipe(str(tmp_path / "gone.jsonl")), Site(workspace=str(tmp_path)))
