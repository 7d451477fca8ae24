"""The rewards' client against servers that fail in every way, scoring beside a rollout, and where rewards come from."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from model_core.documents import UserError
from model_core.exit_codes import INFRASTRUCTURE
from model_core.recipe import Scenes
from model_core.rewards.client import HTTPScorer
from model_core.rewards.combined import CombinedScorer
from model_core.rewards.opening import URI_VARIABLE, local_scorers, open_scorer
from model_core.rewards.overlap import OverlappedScoring
from model_core.rewards.verdict import RewardUnavailable, Score, ScoreRequest, Value
from model_core.site import parse_site
from tests.reward_servers import Brightness, answering, http_answer, picture_request, running

ONE = {"red": {"value": 0.5, "uncertainty": 0.0}, "green": {"invalid": "dark"}}
GOOD = http_answer(json.dumps({"scores": [ONE]}).encode())
SHORT_PAUSES = pytest.mark.usefixtures("short_pauses")


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_core.rewards.client.FIRST_PAUSE_SECONDS", 0.01)


def client(uri: str, said: list[str], **options: Any) -> HTTPScorer:
    return HTTPScorer(uri, ("red", "green"), **{"timeout_seconds": 10.0, "patience_seconds": 10.0, "say": said.append, **options})


def scores_of(**answer: Any) -> bytes:
    return http_answer(json.dumps({"scores": [answer]}).encode())


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (http_answer(b"<html>"), "found no JSON"),
        (http_answer(b'{"scores": [{"red": {"value": NaN, "uncertainty": 0}}]}'), "NaN is no number"),
        (http_answer(b"{}"), "found NoneType for scores"),
        (http_answer(b'{"scores": []}'), "found 0 answers to 1 requests"),
        (scores_of(red=ONE["red"]), "found the rewards red; asked for were red, green"),
        (scores_of(red=ONE["red"], green=ONE["green"], blue=ONE["red"]), "found the rewards red, green, blue"),
        (scores_of(red=ONE["red"], green={"value": None, "uncertainty": 0.0}), "for green"),
        (http_answer(b'{"scores": [[]]}'), "found the rewards list"),
        (http_answer(b'{"error": "no"}', status=400), "HTTP 400"),
        (http_answer(b"moved", status=302, headers="Location: /\r\n"), "HTTP 302"),
        (http_answer(b"wrong", status=500), "HTTP 500: wrong"),
    ],
)
def test_an_answer_that_is_no_score_ends_it_at_once_and_names_the_service(answer: bytes, found: str, said: list[str]) -> None:
    with answering(answer) as (uri, heard), pytest.raises(RewardUnavailable, match=found) as caught:
        client(uri, said).score([picture_request("a")])
    assert uri in str(caught.value)
    assert len(heard) == 1
    assert said == []


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@SHORT_PAUSES
@pytest.mark.parametrize(
    "failure",
    [
        b"",
        reset,
        GOOD[: len(GOOD) // 2],
        GOOD[:-1],
        b"not HTTP at all\r\n\r\n",
        http_answer(b"", status=502),
        http_answer(b"", status=503, headers="Retry-After: 0\r\n"),
        http_answer(b"", status=429),
    ],
    ids=["closed", "reset", "torn head", "torn body", "junk", "502", "503", "429"],
)
def test_a_failure_that_passes_is_asked_again_with_the_same_bytes(failure: Any, said: list[str]) -> None:
    with answering(failure, failure, GOOD) as (uri, heard):
        assert client(uri, said).score([picture_request("a")])[0]["red"] == Value(0.5)
    assert len(heard) == 3
    assert len(set(heard)) == 1
    assert [line.partition(" ")[0] for line in said] == ["waiting", "the"]
    assert uri in said[0]


@SHORT_PAUSES
def test_a_service_that_stays_silent_is_given_up_after_the_patience(said: list[str]) -> None:
    over = threading.Event()
    with answering(lambda _connection: over.wait(20) and None) as (uri, heard):
        with pytest.raises(RewardUnavailable, match=r"none after \d+ s and \d+ attempts; the last one: TimeoutError") as caught:
            client(uri, said, timeout_seconds=0.1, patience_seconds=0.4).score([picture_request("a")])
        over.set()
    assert uri in str(caught.value)
    assert heard


def test_a_service_that_is_not_there_is_named_with_the_reason(said: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(RewardUnavailable, match=rf"http://127\.0\.0\.1:{port}: none after 0 s and 1 attempts.*ConnectionRefusedError"):
        client(f"http://127.0.0.1:{port}", said, patience_seconds=0.0).score([picture_request("a")])
    assert said == []


def test_retry_after_beyond_the_patience_ends_it_now(said: list[str]) -> None:
    full = http_answer(b"full", status=503, headers="Retry-After: 3600\r\n")
    with answering(full) as (uri, heard), pytest.raises(RewardUnavailable, match="HTTP 503: full"):
        client(uri, said).score([picture_request("a")])
    assert len(heard) == 1


@SHORT_PAUSES
def test_a_service_that_goes_and_comes_back_loses_nothing(said: list[str]) -> None:
    with running(Brightness()) as (uri, _):
        scorer = client(uri, said, patience_seconds=30.0)
        before = scorer.score([picture_request("a")])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(scorer.score, [picture_request("a"), picture_request("b", green=9)])
        while not said:
            threading.Event().wait(0.01)
        with running(Brightness(), port=int(uri.rpartition(":")[2])):
            after = waiting.result(30)
    assert after[0] == before[0]
    assert after[1]["green"] == Value(9.0)
    assert "ConnectionRefusedError" in said[0] or "ConnectionResetError" in said[0]
    assert "are back" in said[1]


@pytest.mark.parametrize(("pictures", "size"), [(2, 1 << 20), (64, 1)])
def test_many_pictures_go_in_several_posts(pictures: int, size: int, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_core.rewards.client.POST_PICTURES", pictures)
    monkeypatch.setattr("model_core.rewards.client.POST_BYTES", size)
    scorer = Brightness()
    with running(scorer) as (uri, service):
        scores = client(uri, said).score([picture_request(str(green), green=green) for green in range(1, 6)])
        text = service.metrics.text()
    assert [score["green"] for score in scores] == [Value(float(green)) for green in range(1, 6)]
    assert f'requests_total{{status="200"}} {3 if pictures == 2 else 5}\n' in text


def test_overlapped_scores_come_in_the_order_they_were_asked_for() -> None:
    first_may_end = threading.Event()

    class Turned(Brightness):
        def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
            if requests[0].key == "1":
                assert first_may_end.wait(20)
            return super().score(requests)

    with OverlappedScoring(Turned(), num_threads=2, max_waiting=4) as scoring:
        scoring.submit([picture_request("1", green=1)])
        assert scoring.submit([picture_request("2", green=2)]).result(20)[0]["green"] == Value(2.0)
        with pytest.raises(TimeoutError):
            scoring.collect(timeout_seconds=0.01)
        first_may_end.set()
        assert [scores[0]["green"] for scores in scoring.collect()] == [Value(1.0), Value(2.0)]
        assert scoring.collect() == []
        scoring.submit([picture_request("3", green=3)])
        assert [scores[0]["green"] for scores in scoring.collect()] == [Value(3.0)]


def test_a_failure_of_overlapped_scoring_surfaces_at_the_next_call() -> None:
    scorer = Brightness()
    scorer.failure = RewardUnavailable("none after 900 s")
    with OverlappedScoring(scorer, num_threads=1, max_waiting=4) as scoring:
        failed = scoring.submit([picture_request("1")])
        assert isinstance(failed.exception(20), RewardUnavailable)
        with pytest.raises(RewardUnavailable, match="900 s"):
            scoring.submit([picture_request("2")])
        with pytest.raises(RewardUnavailable, match="900 s"):
            scoring.collect()
    assert scorer.keys == ["1"]


def test_no_more_batches_wait_than_allowed() -> None:
    scorer = Brightness()
    scorer.hold()
    with OverlappedScoring(scorer, num_threads=1, max_waiting=1) as scoring:
        scoring.submit([picture_request("1")])
        scorer.begun.acquire()
        scoring.submit([picture_request("2")])
        third = threading.Thread(target=scoring.submit, args=([picture_request("3")],))
        third.start()
        third.join(0.1)
        assert third.is_alive()
        scorer.release()
        third.join(20)
        assert len(scoring.collect()) == 3


def test_the_launchers_service_goes_before_the_sites(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    def local() -> list[Any]:
        raise AssertionError("was made")

    with running(Brightness()) as (first, _), running(Brightness()) as (second, _):
        site = parse_site({"rewards": {"uri": first, "patience_seconds": 0}}, "site")
        asked = [picture_request("a")]
        assert open_scorer(site, ["green"], local=local, say=said.append).score(asked) == [{"green": Value(50.0)}]
        monkeypatch.setenv(URI_VARIABLE, second)
        assert open_scorer(site, ["red"], local=local, say=said.append).score(asked) == [{"red": Value(100 / 255, 0.25)}]


def test_without_a_service_rewards_are_scored_in_process(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    site = parse_site({}, "site")
    scorer = open_scorer(
        site, ["red", "check_mean"], local=lambda: local_scorers([], scenes=Scenes(), models=[Brightness()]), say=said.append
    )
    assert isinstance(scorer, CombinedScorer)
    assert set(scorer.score([picture_request("a")])[0]) == {"red", "check_mean"}
    with pytest.raises(UserError, match="found taste; allowed are red, green, check_color"):
        open_scorer(site, ["taste"], local=lambda: local_scorers([], scenes=Scenes(), models=[Brightness()]), say=said.append)


@pytest.mark.parametrize(
    "rewards",
    [
        {"uri": "localhost:80"},
        {"uri": "http:///x"},
        {"uri": "http://host:port"},
        {"timeout_seconds": 0},
        {"patience_seconds": -1},
        {"url": "http://x"},
    ],
)
def test_a_site_with_wrong_rewards_is_refused(rewards: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"site: rewards\."):
        parse_site({"rewards": rewards}, "site")


@pytest.mark.parametrize("launch", [{"default": {"reward_service": True}}, {"steps": {"train_vae": {"reward_service": True}}}])
def test_a_reward_service_beside_another_step_is_refused(launch: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"found reward_service true; allowed is false, it is for steps\.align_grpo alone"):
        parse_site({"launch": launch}, "site")


def test_the_launcher_and_the_step_speak_of_the_same_variable() -> None:
    from components.launch import rewards

    assert rewards.URI_VARIABLE == URI_VARIABLE


def test_rewards_that_cannot_be_had_end_a_step_as_something_to_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from model_core import __main__ as program

    def unavailable(*_: object) -> None:
        raise RewardUnavailable("none after 900 s")

    monkeypatch.setattr(program, "load_site", unavailable)
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)
    given = ["train_vae", "--recipe", "r", "--site", "s", "--run", "r", "--output", "o"]
    assert program.main(given) == INFRASTRUCTURE
