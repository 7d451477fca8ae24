"""`darkroom label` as people use it: keys pressed in a real browser, pages reloaded, servers killed. No vote is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipelines.documents import find_site
from tests.browser import Page, chromium, find_chromium
from tests.preference_pairs import commit_preferences, waiting_edit, waiting_pair

DARKROOM = str(Path(sys.executable).parent / "darkroom")
READY = "document.getElementById('pair').getAttribute('aria-busy') == 'false'"
NUM_PAIRS = 12
# What is pressed on each of ten pairs, and the vote that it means: label, and scores of left and right.
KEYS: list[tuple[list[tuple[str, bool]], str, tuple[int, int] | None]] = [
    ([("ArrowLeft", False)], "left", None),
    ([("ArrowRight", False)], "right", None),
    ([("=", False)], "tie", None),
    ([("t", False)], "tie", None),
    ([("5", False), ("2", True), ("ArrowLeft", False)], "left", (5, 2)),
    ([("1", False), ("9", False), ("ArrowRight", False)], "right", (1, 4)),
    ([("3", False), ("0", False), ("4", False), ("ArrowRight", False)], "right", (4, 5)),
    ([("4", False), ("4", False), ("ArrowLeft", False)], "left", None),
    ([("x", False), ("2", False)], "unclear", None),
    ([("x", False), ("Escape", False), ("6", False), ("1", False), ("=", False)], "tie", (1, 1)),
]


@dataclass
class Labelling:
    """A running `darkroom label`, and what it told when it began."""

    process: subprocess.Popen[str]
    url: str
    pairs: int
    labelled: int

    def end(self) -> tuple[int, str]:
        """Ctrl-C; its exit code and what it said."""
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    find_chromium()
    with chromium(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pairs = [waiting_pair(index) for index in range(NUM_PAIRS)]
    edits = [waiting_edit(index, num_sources=1 + index % 2) for index in range(3)]
    commit_preferences(find_site("local"), [*pairs, *edits, waiting_pair(0, dimension="aesthetics", size_px=1600)])
    return tmp_path


@pytest.fixture
def label(here: Path) -> Iterator[Any]:
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> Labelling:
        command = [DARKROOM, "label", "r", "--annotator", "ana", "--json", *arguments]
        process = subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        told, line = "", ""
        while line != "}\n":
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            told += line
        opened = json.loads(told)
        assert opened["votes"] == str(here / "votes.jsonl")
        return Labelling(process, opened["url"], opened["pairs"], opened["labelled"])

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def lines(here: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (here / "votes.jsonl").read_text().splitlines()]


def count(page: Page) -> str:
    return str(page.eval("document.getElementById('count').textContent"))


def prompt(page: Page) -> str:
    return str(page.eval("document.getElementById('prompt').textContent"))


def opened(page: Page, url: str) -> None:
    page.open(url)
    page.wait(f"location.href == {url!r} && document.readyState == 'complete' && {READY}")


def labels(page: Page, labelled: Labelling, keys: list[tuple[str, bool]]) -> dict[str, Any]:
    """Presses the keys on the pair that is shown, waits until the page goes on; returns what the server knows of that pair then."""
    number = int(count(page).split()[0])
    before = next(index for index, pair in enumerate(state(page)["pairs"]) if pair["prompt"] == prompt(page))
    for key, shift in keys:
        page.press(key, shift=shift)
    page.wait(f"document.getElementById('count').textContent == '{number + 1} of {labelled.pairs}' && {READY}")
    pair: dict[str, Any] = state(page)["pairs"][before]
    return pair


def state(page: Page) -> dict[str, Any]:
    """What the server tells the page now."""
    told: dict[str, Any] = page.eval("fetch('state').then((response) => response.json())")
    return told


def test_ten_pairs_by_keyboard_then_reload_and_restart_lose_none(browser: Page, label: Any, here: Path) -> None:
    labelling = label()
    assert (labelling.pairs, labelling.labelled) == (NUM_PAIRS, 0)
    opened(browser, labelling.url)
    for number, (keys, meaning, scores) in enumerate(KEYS):
        assert prompt(browser) == waiting_pair(number).prompt
        vote = labels(browser, labelling, keys)["vote"]
        expected = {"left": scores[0], "right": scores[1]} if scores else None
        reason = "unclear" if meaning == "unclear" else None
        assert vote == {"label": "invalid" if reason else meaning, "scores": expected, "reason": reason}, f"pair {number}"
        assert len(lines(here)) == number + 1, "a vote is in the file before the page goes on"
    written = lines(here)
    assert [line["pair_id"] for line in written] == [waiting_pair(number).pair_id for number in range(10)]
    assert {line["label"] for line in written} == {"a", "b", "tie", "invalid"}

    browser.reload()
    browser.wait(READY)
    assert count(browser) == f"10 of {NUM_PAIRS}"
    assert prompt(browser) == waiting_pair(10).prompt
    code, said = labelling.end()
    assert code == 0
    assert f"10 votes written to {here / 'votes.jsonl'}; 10 of {NUM_PAIRS} pairs have yours" in said
    assert f'preferences.votes=["{here / "votes.jsonl"}"]' in said

    again = label()
    assert again.labelled == 10
    opened(browser, again.url)
    for _ in range(2):
        labels(browser, again, [("ArrowLeft", False)])
    assert browser.eval("document.getElementById('done').hidden") is False
    assert lines(here)[:10] == written
    assert len(lines(here)) == NUM_PAIRS
    assert browser.problems == []


def test_side_that_was_pressed_is_the_picture_that_was_seen_there(browser: Page, label: Any, here: Path) -> None:
    """The page's left picture is compared, pixel by pixel, with the pair's own."""
    labelling = label()
    opened(browser, labelling.url)
    for number in range(4):
        seen = browser.eval(
            "fetch(document.querySelector('#left img').src).then((r) => r.arrayBuffer()).then((b) => Array.from(new Uint8Array(b)))"
        )
        pair = waiting_pair(number)
        side = {pair.image_a: "a", pair.image_b: "b"}[bytes(seen)]
        labels(browser, labelling, [("ArrowLeft", False)])
        assert lines(here)[-1]["label"] == side


def test_back_shows_the_vote_and_another_one_replaces_it(browser: Page, label: Any, here: Path) -> None:
    labelling = label()
    opened(browser, labelling.url)
    labels(browser, labelling, [("ArrowLeft", False)])
    labels(browser, labelling, [("ArrowLeft", False)])
    browser.press("Backspace")
    browser.wait(READY)
    assert prompt(browser) == waiting_pair(1).prompt
    assert browser.eval("document.querySelector('[aria-pressed=true]').dataset.label") == "left"
    browser.press("t")
    browser.wait(f"document.getElementById('prompt').textContent == {waiting_pair(2).prompt!r} && {READY}")
    assert [line["pair_id"] for line in lines(here)] == ["pair-000", "pair-001", "pair-001"]
    assert lines(here)[-1]["label"] == "tie"
    assert labelling.end()[0] == 0
    assert label().labelled == 2


def test_pair_that_was_skipped_comes_again_at_the_end(browser: Page, label: Any) -> None:
    labelling = label()
    opened(browser, labelling.url)
    browser.press("n")
    browser.wait(f"document.getElementById('prompt').textContent == {waiting_pair(1).prompt!r} && {READY}")
    for _ in range(NUM_PAIRS - 1):
        labels(browser, labelling, [("=", False)])
    assert prompt(browser) == waiting_pair(0).prompt


def test_edits_are_shown_with_their_sources_and_by_keyboard_alone(browser: Page, label: Any) -> None:
    labelling = label("--dimension", "instruction_following")
    opened(browser, labelling.url)
    for number in range(3):
        assert browser.eval("document.querySelectorAll('#sources img').length") == 1 + number % 2
        assert browser.eval("[...document.images].every((image) => image.alt && image.naturalWidth == 64)")
        labels(browser, labelling, [("x", False), ("5", False)])
    assert all(pair["vote"]["reason"] == "source" for pair in state(browser)["pairs"])


def test_pictures_of_actual_size_are_moved_together_and_that_is_no_vote(browser: Page, label: Any, here: Path) -> None:
    opened(browser, label("--dimension", "aesthetics").url)
    browser.press("z")
    for _ in range(3):
        browser.press("ArrowRight", shift=True)
    browser.wait("[...document.querySelectorAll('.well')].every((well) => well.scrollLeft == 240)")
    assert browser.eval("document.querySelector('#left img').width") == 1600
    assert lines(here) == []
    browser.press("z")
    assert browser.eval("document.querySelector('#left img').width") < 1600


def test_one_score_alone_is_not_sent(browser: Page, label: Any, here: Path) -> None:
    opened(browser, label().url)
    browser.press("4")
    browser.press("ArrowLeft")
    assert "Only one picture has a score" in browser.eval("document.getElementById('status').textContent")
    assert lines(here) == []
    assert prompt(browser) == waiting_pair(0).prompt


def test_server_killed_while_people_label_loses_no_vote_that_the_page_took(browser: Page, label: Any, here: Path) -> None:
    taken = 0
    for sitting in range(3):
        labelling = label()
        assert labelling.labelled == taken
        opened(browser, labelling.url)
        assert count(browser) == f"{taken} of {NUM_PAIRS}"
        for _ in range(1 + sitting):
            labels(browser, labelling, [("ArrowRight", False)])
        taken += 1 + sitting
        if sitting:
            labelling.process.send_signal(signal.SIGSTOP)  # the vote reaches a server that does not answer any more
        browser.press("ArrowRight")  # in the midst of which the server is killed
        labelling.kill()
        browser.wait(f"!document.getElementById('note').hidden || document.getElementById('count').textContent.startsWith('{taken + 1} ')")
        browser.wait(READY)
        on_page = int(count(browser).split()[0])
        assert on_page <= len(lines(here)) <= taken + 1
        taken = len(lines(here))
        with (here / "votes.jsonl").open("a") as file:  # as a vote would be that was half written
            file.write('{"pair_id": "pair-0')
    final = label()
    assert final.labelled == taken
    assert 6 <= taken <= 7
    assert (here / "votes.jsonl.torn").read_text() == 3 * '{"pair_id": "pair-0\n'
    _, said = final.end()
    assert "torn" in said
    browser.problems.clear()  # that a server did not answer was meant


def test_vote_that_the_server_cannot_take_is_said_to_be_unsaved(browser: Page, label: Any, here: Path) -> None:
    labelling = label()
    opened(browser, labelling.url)
    labelling.kill()
    browser.press("ArrowLeft")
    browser.wait("!document.getElementById('note').hidden")
    assert "Not saved" in browser.eval("document.getElementById('note').textContent")
    assert count(browser) == f"0 of {NUM_PAIRS}"
    assert prompt(browser) == waiting_pair(0).prompt
    browser.problems.clear()  # that the server did not answer was meant
