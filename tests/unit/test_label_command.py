"""`darkroom label`: which pairs it shows, and what it refuses before it writes anything."""

from __future__ import annotations

import json
import shlex
import socket
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from model_core.data.preferences import RUBRIC_VERSION
from model_core.data.votes import Vote
from model_core.documents import UserError
from pipelines.documents import find_recipe, find_site
from pipelines.labelling.command import check_annotator, find_pairs, summary
from pipelines.labelling.session import LabellingSession
from pipelines.labelling.votes_file import VotesFile
from tests.preference_pairs import commit_preferences, waiting_edit, waiting_pair
from tests.unit.test_cli_errors import assert_refused, call

KNOWN = replace(waiting_pair(2), label="a", reason="wrong_shape")
PAIRS = [waiting_pair(0), waiting_pair(1), KNOWN, waiting_edit(3)]
VOTE = Vote(
    pair_id="pair-000",
    dimension="alignment",
    label="tie",
    annotator="ana",
    scores=None,
    rubric_version=RUBRIC_VERSION,
    reason=None,
    time="2026-11-21T09:30:00+00:00",
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(place: str, **options: Any) -> list[str]:
    return [pair.pair_id for pair in find_pairs(find_site("local"), place, **({"dimension": "alignment", "all_pairs": False} | options))]


def test_pairs_that_wait_are_found_by_run_manifest_folder_or_uri(here: Path) -> None:
    place = commit_preferences(find_site("local"), PAIRS)
    for name in ("r", str(place), f"{place}/manifest.json", f"{place.as_uri()}/manifest.json", f"./{place.relative_to(here)}/"):
        assert shown(name) == ["pair-000", "pair-001"]


def test_pairs_are_those_of_the_dimension_and_with_all_those_that_have_a_label_too(here: Path) -> None:
    commit_preferences(find_site("local"), PAIRS)
    assert shown("r", dimension="instruction_following") == ["pair-003"]
    assert shown("r", all_pairs=True) == ["pair-000", "pair-001", "pair-002"]


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str, words: tuple[str, ...]) -> None:
    """The call is refused, and has changed nothing here."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    assert_refused(capsys, call(monkeypatch, "label", *arguments), *words)
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_run_without_pairs_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    commit_preferences(find_site("local"), PAIRS)
    next(here.glob("workspace/runs/r/steps/*.json")).unlink()
    refusal(monkeypatch, capsys, "r", words=("r", "not built its preference pairs yet"))


def test_result_of_another_step_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = commit_preferences(find_site("local"), PAIRS) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": "train_vae"}))
    refusal(monkeypatch, capsys, str(path), words=("train_vae", "build_preferences"))


@pytest.mark.parametrize(
    ("dimension", "words"),
    [("portrait", ("portrait", "alignment 2", "instruction_following 1")), ("aesthetics", ("aesthetics", "--all shows the 1"))],
)
def test_nothing_to_label_is_refused_and_says_where_there_is(
    dimension: str, words: tuple[str, ...], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit_preferences(find_site("local"), [*PAIRS, replace(KNOWN, dimension="aesthetics")])
    refusal(monkeypatch, capsys, "r", "--dimension", dimension, words=words)


def test_taken_port_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    commit_preferences(find_site("local"), PAIRS)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        refusal(monkeypatch, capsys, "r", "--port", port, words=("--port", port, "0 takes a free one"))


def test_votes_of_another_rubric_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    commit_preferences(find_site("local"), PAIRS)
    Path("old.jsonl").write_text(json.dumps(asdict(VOTE) | {"rubric_version": "0"}) + "\n")
    refusal(monkeypatch, capsys, "r", "--votes", "old.jsonl", words=("old.jsonl", "line 1", "'0'", RUBRIC_VERSION))


def test_votes_that_cannot_be_written_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    commit_preferences(find_site("local"), PAIRS)
    refusal(monkeypatch, capsys, "r", "--votes", "/dev/null/votes.jsonl", words=("/dev/null/votes.jsonl", "cannot be written"))


def test_what_the_end_says_to_set_is_what_a_recipe_reads(tmp_path: Path) -> None:
    path = tmp_path / "Zoë's votes.jsonl"
    file = VotesFile(path)
    said = summary(LabellingSession(PAIRS, dimension="alignment", annotator="ana", votes=file), path)
    file.close()
    *_, assignment = shlex.split(said.splitlines()[-1].partition("with: ")[2])
    assert find_recipe("smoke", [assignment]).preferences.votes == [str(path)]


@pytest.mark.parametrize("name", ["", " ", "x" * 101, "a\nb"])
def test_name_that_no_line_can_carry_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--annotator"):
        check_annotator(name)


def test_name_is_the_accounts_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ana")
    assert check_annotator(None) == "ana"
