"""The labelling page's server: whom it answers, what it takes for a vote, and what it never shows."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from model_core.data.preferences import Preference
from model_core.documents import UserError
from pipelines.labelling.server import LabellingServer
from pipelines.labelling.session import LabellingSession
from pipelines.labelling.votes_file import VotesFile
from tests.preference_pairs import waiting_edit, waiting_pair

PAIRS = [waiting_pair(0), waiting_pair(1), waiting_edit(2, dimension="alignment", num_sources=2)]
VOTE = {"pair_id": "pair-000", "label": "left", "scores": {"left": 5, "right": 2}, "reason": None}


def session(path: Path, *, annotator: str = "ana", pairs: list[Preference] = PAIRS) -> LabellingSession:
    return LabellingSession(pairs, dimension="alignment", annotator=annotator, votes=VotesFile(path))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LabellingServer]:
    with LabellingServer(port=0) as server:
        server.session = session(tmp_path / "votes.jsonl")
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def call(server: LabellingServer, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    """Status, body and headers of a call to `path` below the token; one that begins with / is taken as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    place = path if path.startswith("/") else f"/{server.token}/{path}"
    connection.request(method, place, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    is_json = response.headers["Content-Type"] == "application/json"
    return response.status, json.loads(data) if is_json else data, dict(response.headers)


def vote(server: LabellingServer, document: Any, **headers: str) -> tuple[int, Any]:
    return call(server, "POST", "votes", json.dumps(document).encode(), **({"Content_Type": "application/json"} | headers))[:2]


def lines(server: LabellingServer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(server.session.state()["file"]).read_text().splitlines()]


def test_page_and_all_it_asks_for_come_from_this_server(server: LabellingServer) -> None:
    status, page, headers = call(server, "GET", "")
    assert status == 200
    assert headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert b"http://" not in page
    assert b"https://" not in page
    for name in (b"report.css", b"page.css", b"page.js"):
        assert name in page
        status, content, _ = call(server, "GET", name.decode())
        assert status == 200
        assert b"http:" not in content
        assert b"https:" not in content


def test_pictures_are_those_of_the_pair_on_the_side_that_the_session_says(server: LabellingServer) -> None:
    for number, pair in enumerate(PAIRS):
        files = {"a": pair.image_a, "b": pair.image_b}
        left = server.session.left(pair.pair_id)
        assert call(server, "GET", f"pictures/{number}/left")[1] == files.pop(left)
        status, right, headers = call(server, "GET", f"pictures/{number}/right")
        assert (status, headers["Content-Type"]) == (200, "image/png")
        assert [right] == list(files.values())
    assert call(server, "GET", "pictures/2/source-1")[1] == PAIRS[2].sources[1]


@pytest.mark.parametrize(
    "path",
    ["pictures/3/left", "pictures/-1/left", "pictures/0/a", "pictures/0/source-0", "pictures/x/left", "server.py", "../server.py", "?x=1"],
)
def test_what_is_not_there_is_not_found(path: str, server: LabellingServer) -> None:
    assert call(server, "GET", path)[0] == 404


def test_state_never_tells_which_picture_is_a(server: LabellingServer) -> None:
    vote(server, VOTE)
    _, state, _ = call(server, "GET", "state")
    assert [set(pair) for pair in state["pairs"]] == [{"pair_id", "prompt", "num_sources", "vote"}] * 3
    assert state["pairs"][0]["vote"] == {"label": "left", "scores": {"left": 5, "right": 2}, "reason": None}
    assert [pair["vote"] for pair in state["pairs"][1:]] == [None, None]


def test_vote_on_a_side_is_written_as_one_on_its_picture(server: LabellingServer) -> None:
    seen = set()
    for pair in PAIRS:
        left = server.session.left(pair.pair_id)
        right = "b" if left == "a" else "a"
        for label, expected in {"left": left, "right": right, "tie": "tie"}.items():
            assert vote(server, VOTE | {"pair_id": pair.pair_id, "label": label})[0] == 200
            last = lines(server)[-1]
            assert (last["pair_id"], last["label"], last["scores"]) == (pair.pair_id, expected, {left: 5, right: 2})
            assert list(last["scores"]) == ["a", "b"]
            seen.add((label, expected))
    assert vote(server, {"pair_id": "pair-001", "label": "invalid", "scores": None, "reason": "broken"})[1] == {"num_labelled": 3}
    assert {"label": "invalid", "reason": "broken", "scores": None, "annotator": "ana"}.items() <= lines(server)[-1].items()
    assert server.session.num_written == 10


def test_sides_are_balanced_and_differ_between_people(tmp_path: Path) -> None:
    names = [f"pair-{index}" for index in range(1000)]
    ana, bo = session(tmp_path / "a.jsonl"), session(tmp_path / "b.jsonl", annotator="bo")
    of_ana, of_bo = [ana.left(name) for name in names], [bo.left(name) for name in names]
    # 1000 fair draws: five standard deviations, sqrt(1000) / 2, are 79.
    assert abs(of_ana.count("a") - 500) < 79
    assert abs(sum(x == y for x, y in zip(of_ana, of_bo, strict=True)) - 500) < 79
    again = session(tmp_path / "c.jsonl")
    assert of_ana == [again.left(name) for name in names]


WRONG_VOTES: dict[str, tuple[Any, str]] = {
    "no mapping": ([1], "found list"),
    "a missing field": ({"pair_id": "pair-000", "label": "left"}, "label, pair_id"),
    "an unknown field": (VOTE | {"annotator": "bo"}, "annotator"),
    "an unknown pair": (VOTE | {"pair_id": "pair-999"}, "pair-999"),
    "a pair that is no text": (VOTE | {"pair_id": ["pair-000"]}, "pair"),
    "an unknown label": (VOTE | {"label": "a"}, "left, right, tie, invalid"),
    "a label that is no text": (VOTE | {"label": {}}, "label"),
    "a score above the scale": (VOTE | {"scores": {"left": 6, "right": 1}}, "1 to 5"),
    "a score below the scale": (VOTE | {"scores": {"left": 1, "right": 0}}, "1 to 5"),
    "a score that is not whole": (VOTE | {"scores": {"left": 1.5, "right": 1}}, "1 to 5"),
    "a score that is a truth": (VOTE | {"scores": {"left": True, "right": 1}}, "1 to 5"),
    "one score": (VOTE | {"scores": {"left": 1}}, "1 to 5"),
    "scores of an invalid pair": (VOTE | {"label": "invalid", "reason": "broken"}, "invalid pair"),
    "an invalid pair without a reason": (VOTE | {"label": "invalid", "scores": None}, "broken"),
    "an unknown reason": (VOTE | {"label": "invalid", "scores": None, "reason": "boring"}, "boring"),
    "a reason that is a list": (VOTE | {"label": "invalid", "scores": None, "reason": ["broken"]}, "reason"),
    "a reason of a valid pair": (VOTE | {"reason": "broken"}, "broken"),
}


@pytest.mark.parametrize("case", WRONG_VOTES)
def test_wrong_vote_is_refused_in_a_sentence(case: str, server: LabellingServer) -> None:
    document, word = WRONG_VOTES[case]
    status, answer = vote(server, document)
    assert status == 400
    assert answer["error"].startswith("vote: ")
    assert word in answer["error"]
    assert lines(server) == []


def test_body_that_is_no_json_or_too_long_is_refused(server: LabellingServer) -> None:
    assert call(server, "POST", "votes", b"{", Content_Type="application/json")[0] == 400
    assert call(server, "POST", "votes", b"", Content_Type="application/json", Content_Length="100000")[0] == 413


STRANGERS: dict[str, tuple[dict[str, str], int]] = {
    "a name that was rebound to this machine": ({"Host": "evil.example:{port}"}, 403),
    "a page of another origin": ({"Origin": "https://evil.example"}, 403),
    "a sandboxed page": ({"Origin": "null"}, 403),
    "a form, which needs no permission to call": ({"Content_Type": "text/plain"}, 415),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_no_other_page_can_vote(case: str, server: LabellingServer) -> None:
    headers, expected = STRANGERS[case]
    filled = {name: value.format(port=server.server_port) for name, value in headers.items()}
    assert vote(server, VOTE, **filled)[0] == expected
    assert lines(server) == []
    assert vote(server, VOTE)[0] == 200


@pytest.mark.parametrize("path", ["/", "/votes", "/guess/", "/guess/state", "//state"])
def test_nothing_is_found_without_the_token(path: str, server: LabellingServer) -> None:
    assert call(server, "GET", path)[0] == 404
    assert call(server, "POST", path, json.dumps(VOTE).encode(), Content_Type="application/json")[0] == 404


def test_page_is_reached_through_a_tunnel_from_another_port(server: LabellingServer) -> None:
    assert vote(server, VOTE, Host="localhost:9000", Origin="http://localhost:9000")[0] == 200


def test_vote_that_cannot_be_written_is_not_said_to_be(server: LabellingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    status, answer = vote(server, VOTE)
    assert (status, answer["error"]) == (507, "the vote could not be written (No space left on device)")
    assert lines(server) == []


def test_votes_at_once_are_lines_of_their_own(server: LabellingServer) -> None:
    threads = [Thread(target=vote, args=(server, VOTE)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(server)) == 8


def test_picture_that_is_none_is_served_as_bytes(tmp_path: Path, server: LabellingServer) -> None:
    server.session = session(tmp_path / "other.jsonl", pairs=[replace(PAIRS[0], image_a=b"x", image_b=b"x")])
    assert call(server, "GET", "pictures/0/left")[2]["Content-Type"] == "application/octet-stream"


def test_port_that_is_taken_is_refused(server: LabellingServer) -> None:
    with pytest.raises(UserError, match=f"--port: found {server.server_port}"):
        LabellingServer(port=server.server_port)


def test_latest_vote_of_the_same_person_counts_and_others_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    for annotator, label in (("ana", "left"), ("bo", "right"), ("ana", "tie")):
        one = LabellingSession(PAIRS, dimension="alignment", annotator=annotator, votes=(file := VotesFile(path)))
        one.cast(VOTE | {"label": label})
        file.close()
    assert {name: vote.label for name, vote in session(path).latest().items()} == {"pair-000": "tie"}
