"""The reward service over loopback HTTP: what it answers, keeps, refuses and counts."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model_core.rewards import endpoints
from model_core.rewards.answers import AnswerBook, KeyConflict
from model_core.rewards.batching import Answer, Batcher, QueueFull
from model_core.rewards.client import HTTPScorer
from model_core.rewards.metrics import MAX_REASONS, Metrics
from model_core.rewards.verdict import Invalid, RewardUnavailable, ScoreRequest, Value
from model_core.rewards.wire import SCORE_PATH, WireError, parse, read_request, read_scores, request_document
from tests.reward_servers import Brightness, body_of, get, picture_request, post, running


@pytest.fixture
def scorer() -> Brightness:
    return Brightness()


@pytest.fixture(scope="module")
def unused() -> Iterator[tuple[str, Brightness]]:
    """A service that is to score nothing."""
    scorer = Brightness()
    with running(scorer) as (uri, _):
        yield uri, scorer


def batcher_of(scorer: Brightness, *, batch_size: int = 4, queue_size: int = 8) -> Batcher:
    return Batcher(scorer, batch_size=batch_size, linger_seconds=0.0, queue_size=queue_size, scored=lambda _answers: None)


def client(uri: str, said: list[str], **options: Any) -> HTTPScorer:
    return HTTPScorer(uri, ("red", "green"), **{"timeout_seconds": 10.0, "patience_seconds": 10.0, "say": said.append, **options})


def metric(text: str, name: str) -> float:
    (found,) = re.findall(rf"^darkroom_rewards_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found)


def metric_or_zero(text: str, name: str) -> float:
    return metric(text, name) if name in text else 0.0


def test_a_request_travels_whole() -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)) for _ in range(3)]
    sent = ScoreRequest(
        key="k", prompt='“汉字” "x"', image=pictures[0], category="edit", sources=pictures[1:], notes={"change": {"to": "K7"}, "n": 1.5}
    )
    got = read_request(parse(json.dumps(request_document(sent)).encode()))
    assert (got.key, got.prompt, got.category, got.notes) == (sent.key, sent.prompt, sent.category, sent.notes)
    for before, after in zip(pictures, (got.image, *got.sources), strict=True):
        assert np.array_equal(np.asarray(before), np.asarray(after))


def test_scores_come_over_http_as_they_are(scorer: Brightness, said: list[str]) -> None:
    with running(scorer) as (uri, _):
        asked = [picture_request("a", red=51, green=0), picture_request("b", red=255, green=7)]
        scores = client(uri, said).score(asked)
    assert scores == [{"red": Value(0.2, 0.25), "green": Invalid("no green")}, {"red": Value(1.0, 0.25), "green": Value(7.0)}]
    assert said == []


def test_only_the_rewards_that_were_asked_for_are_given(scorer: Brightness, said: list[str]) -> None:
    with running(scorer) as (uri, _):
        only_green = HTTPScorer(uri, ("green",), timeout_seconds=10, patience_seconds=0, say=said.append)
        assert only_green.score([picture_request("a")]) == [{"green": Value(50.0)}]


def test_the_same_key_is_scored_once_and_answered_again(scorer: Brightness, said: list[str]) -> None:
    with running(scorer) as (uri, service):
        first = client(uri, said).score([picture_request("a"), picture_request("a"), picture_request("b")])
        again = client(uri, said).score([picture_request("b"), picture_request("a")])
        text = service.metrics.text()
    assert first[0] == first[1] == again[1]
    assert scorer.keys == ["a", "b"]
    assert metric(text, "cache_hits_total") == 3
    assert metric(text, "pictures_total") == 2


def test_who_lost_patience_with_a_slow_batch_gets_its_answer_when_asking_again(
    scorer: Brightness, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_core.rewards.client.FIRST_PAUSE_SECONDS", 0.01)

    def say(line: str) -> None:
        said.append(line)
        scorer.release()

    scorer.hold()
    with running(scorer) as (uri, _):
        assert client(uri, said, timeout_seconds=0.2, say=say).score([picture_request("a")])[0]["green"] == Value(50.0)
    assert scorer.keys == ["a"]
    assert "TimeoutError" in said[0]


def test_a_key_with_other_content_is_a_conflict(scorer: Brightness, said: list[str]) -> None:
    with running(scorer) as (uri, _):
        client(uri, said).score([picture_request("a", prompt="one")])
        assert post(uri, body_of(picture_request("a", prompt="two")))[0] == 409
        with pytest.raises(RewardUnavailable, match="409.*the key 'a' with other content"):
            client(uri, said).score([picture_request("a", red=1)])
        with pytest.raises(RewardUnavailable, match="409"):
            client(uri, said).score([picture_request("b", red=1), picture_request("b", red=2)])
    assert scorer.keys == ["a"]
    assert said == []


def test_a_full_queue_answers_503_and_when_to_come_again(scorer: Brightness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "QUEUE_PICTURES", 2)
    scorer.hold()
    with running(scorer, batch_size=1) as (uri, service), ThreadPoolExecutor(2) as pool:
        at_work = pool.submit(post, uri, body_of(picture_request("a")))
        scorer.begun.acquire()
        waiting = pool.submit(post, uri, body_of(picture_request("b"), picture_request("c")))
        while metric(service.metrics.text(), "queue_depth") < 2:
            threading.Event().wait(0.01)
        status, answer, headers = post(uri, body_of(picture_request("d")))
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "2 requests waiting" in answer["error"]
        scorer.release()
        assert [future.result(20)[0] for future in (at_work, waiting)] == [200, 200]
    assert scorer.keys == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "found no JSON"),
        (b'{"rewards": ["red"], "requests": [NaN]}', "NaN is no number"),
        (b"[]", "found no mapping"),
        (b'{"rewards": ["red"]}', "found no mapping with the lists"),
        (body_of(picture_request("a"), rewards=()), "found the rewards none; allowed are red, green"),
        (body_of(picture_request("a"), rewards=("taste",)), "found the rewards taste; allowed are red, green"),
        (body_of(picture_request("a")).replace(b'"prompt"', b'"promt"'), "found NoneType for prompt"),
        (json.dumps({"rewards": ["red"], "requests": [request_document(picture_request("a")) | {"image": "AAAA"}]}).encode(), "no PNG"),
        (json.dumps({"rewards": ["red"], "requests": [request_document(picture_request("a")) | {"sources": [3]}]}).encode(), "no PNG"),
        (json.dumps({"rewards": ["red"], "requests": [request_document(picture_request("a")) | {"notes": []}]}).encode(), "list for notes"),
    ],
)
def test_a_bad_request_is_refused_with_what_was_found(body: bytes, words: str, unused: tuple[str, Brightness]) -> None:
    uri, scorer = unused
    status, answer, _ = post(uri, body)
    assert status == 400
    assert words in answer["error"]
    assert scorer.batches == []


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(chunked: bool, scorer: Brightness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "MAX_BODY_BYTES", 1000)
    with running(scorer) as (uri, _):
        body: Any = iter([b" " * 900, b" " * 900]) if chunked else b" " * 1800
        status, answer, _ = post(uri, body)
    assert status == 413
    assert "1000" in answer["error"]


def test_before_the_models_are_loaded_it_is_alive_and_not_ready(scorer: Brightness) -> None:
    with running(scorer, is_open=False) as (uri, service):
        assert get(uri, "/healthz")[0] == 200
        assert get(uri, "/readyz") == (503, '{"ready":false,"rewards":[]}')
        status, answer, headers = post(uri, body_of(picture_request("a")))
        assert (status, headers["Retry-After"], answer["error"]) == (503, "1", "the models are being loaded")
        service.open(scorer)
        assert get(uri, "/readyz") == (200, '{"ready":true,"rewards":["red","green"]}')
        assert post(uri, body_of(picture_request("a")))[0] == 200


def test_a_number_that_is_none_leaves_as_invalid(said: list[str]) -> None:
    class NotFinite(Brightness):
        def score(self, requests: Any) -> Any:
            return [{"red": Value(float("nan")), "green": Value(1.0, float("inf"))} for _ in requests]

    with running(NotFinite()) as (uri, _):
        assert client(uri, said).score([picture_request("a")]) == [{"red": Invalid("not finite"), "green": Invalid("not finite")}]


def test_what_a_scorer_raises_is_told_at_once_and_forgotten(scorer: Brightness, said: list[str]) -> None:
    scorer.failure = ZeroDivisionError("by zero")
    with running(scorer) as (uri, _):
        with pytest.raises(RewardUnavailable, match="500.*ZeroDivisionError: by zero"):
            client(uri, said).score([picture_request("a")])
        scorer.failure = None
        assert client(uri, said).score([picture_request("a")])[0]["green"] == Value(50.0)
    assert scorer.keys == ["a", "a"]
    assert said == []


def test_metrics_count_what_happened(scorer: Brightness, said: list[str]) -> None:
    with running(scorer) as (uri, _):
        client(uri, said).score([picture_request("a", green=0), picture_request("b", green=0), picture_request("c")])
        post(uri, b"{")
        text = get(uri, "/metrics")[1]
    assert metric(text, 'requests_total{status="200"}') == 1
    assert metric(text, 'requests_total{status="400"}') == 1
    assert metric(text, "pictures_total") == 3
    assert 1 <= metric(text, "batches_total") <= 3
    assert metric(text, 'invalid_total{reward="green",reason="no green"}') == 2
    assert metric(text, "latency_seconds_count") == 2
    assert metric(text, 'latency_seconds_bucket{le="+Inf"}') == 2
    assert metric(text, "queue_depth") == metric(text, "cache_hits_total") == 0


def test_latency_buckets_are_cumulative_and_reasons_bounded() -> None:
    metrics = Metrics(queue_depth=lambda: 0, cache_hits=lambda: 0)
    for seconds in (0.004, 0.005, 0.006, 70.0):
        metrics.answered(200, seconds)
    metrics.scored(1, [("a", f'picture "{index}"\n') for index in range(MAX_REASONS + 20)])
    text = metrics.text()
    assert [metric(text, f'latency_seconds_bucket{{le="{bound}"}}') for bound in ("0.005", "0.01", "60.0", "+Inf")] == [2, 3, 3, 4]
    assert metric(text, "latency_seconds_sum") == pytest.approx(70.015)
    assert metric(text, 'invalid_total{reward="a",reason="picture \\"0\\"\\n"}') == 1
    assert metric(text, 'invalid_total{reward="a",reason="other"}') == 20


def test_what_waits_is_scored_together_in_order(scorer: Brightness) -> None:
    scorer.hold()
    batcher = batcher_of(scorer, batch_size=3)
    futures = batcher.submit([picture_request("a")])
    scorer.begun.acquire()
    for key in "bcde":
        futures += batcher.submit([picture_request(key, red=ord(key))])
    scorer.release()
    assert [future.result(20)["red"] for future in futures[1:]] == [Value(ord(key) / 255, 0.25) for key in "bcde"]
    assert [len(batch) for batch in scorer.batches] == [1, 3, 1]
    assert scorer.keys == list("abcde")
    batcher.close()


def test_who_no_longer_waits_cancels_nothing_for_others(scorer: Brightness) -> None:
    scorer.hold()
    batcher = batcher_of(scorer)
    (future,) = batcher.submit([picture_request("a")])
    assert not future.cancel()
    scorer.release()
    assert future.result(20)["green"] == Value(50.0)
    batcher.close()


def test_a_request_that_stops_half_way_is_counted_and_nothing_scored(unused: tuple[str, Brightness]) -> None:
    uri, scorer = unused
    host, _, port = uri.removeprefix("http://").partition(":")
    before = metric_or_zero(get(uri, "/metrics")[1], 'requests_total{status="400"}')
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"POST {SCORE_PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
    while metric_or_zero(get(uri, "/metrics")[1], 'requests_total{status="400"}') == before:
        threading.Event().wait(0.01)
    assert scorer.batches == []


def test_a_queue_takes_all_of_a_request_or_nothing(scorer: Brightness) -> None:
    scorer.hold()
    batcher = batcher_of(scorer, queue_size=2)
    batcher.submit([picture_request("a")])
    scorer.begun.acquire()
    batcher.submit([picture_request("b")])
    with pytest.raises(QueueFull):
        batcher.submit([picture_request("c"), picture_request("d")])
    batcher.submit([picture_request("e")])
    scorer.release()
    batcher.close()
    assert not set(scorer.keys) & {"c", "d"}


def test_closing_finishes_the_batch_and_refuses_the_rest(scorer: Brightness) -> None:
    scorer.hold()
    batcher = batcher_of(scorer, batch_size=1)
    (at_work,) = batcher.submit([picture_request("a")])
    scorer.begun.acquire()
    (waiting,) = batcher.submit([picture_request("b")])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    with pytest.raises(RewardUnavailable, match="stopping"):
        waiting.result(20)
    scorer.release()
    assert at_work.result(20)["green"] == Value(50.0)
    closing.join(20)
    with pytest.raises(RewardUnavailable, match="stopping"):
        batcher.submit([picture_request("c")])
    assert scorer.keys == ["a"]


class Submitted:
    """Stands where the batcher does: futures that the test ends."""

    def __init__(self) -> None:
        self.futures: dict[str, Future[Answer]] = {}
        self.keys: list[str] = []

    def __call__(self, requests: Any) -> list[Future[Answer]]:
        self.keys += [request.key for request in requests]
        self.futures |= {request.key: Future() for request in requests}
        return [self.futures[request.key] for request in requests]


def ask(book: AnswerBook, *keys: str) -> list[Future[Answer]]:
    return book.ask([picture_request(key) for key in keys], ["digest"] * len(keys))


def test_the_answer_that_was_not_asked_for_the_longest_goes_first() -> None:
    submitted = Submitted()
    book = AnswerBook(submitted, capacity=2)
    for key in ("a", "b", "a", "c"):
        ask(book, key)
        if not submitted.futures[key].done():
            submitted.futures[key].set_result({})
    ask(book, "a", "c")
    assert submitted.keys == ["a", "b", "c"]
    ask(book, "b")
    assert submitted.keys == ["a", "b", "c", "b"]


def test_what_is_being_scored_is_never_forgotten_and_what_failed_is() -> None:
    submitted = Submitted()
    book = AnswerBook(submitted, capacity=1)
    first = ask(book, "a", "b", "c")
    assert ask(book, "a", "b", "c") == first
    submitted.futures["b"].set_exception(RewardUnavailable("x"))
    ask(book, "b")
    assert submitted.keys == ["a", "b", "c", "b"]


def test_a_conflict_keeps_nothing_of_the_request_it_came_with() -> None:
    submitted = Submitted()
    book = AnswerBook(submitted, capacity=9)
    ask(book, "a")
    with pytest.raises(KeyConflict):
        book.ask([picture_request("b"), picture_request("a")], ["digest", "another"])
    assert submitted.keys == ["a"]


@pytest.mark.parametrize(
    ("score", "found"),
    [
        ("null", "null"),
        ('"0.5"', '"0.5"'),
        ("true", "true"),
        ("0.5", "0.5"),
        ('{"value": null, "uncertainty": 0}', "null"),
        ('{"value": "1", "uncertainty": 0}', '"1"'),
        ('{"value": true, "uncertainty": 0}', "true"),
        ('{"value": 1e999, "uncertainty": 0}', "Infinity"),
        ('{"value": 1}', '"value": 1'),
        ('{"value": 1, "uncertainty": 0, "invalid": "x"}', "invalid"),
        ('{"invalid": 3}', "3"),
    ],
)
def test_what_is_no_score_is_refused_with_what_was_found(score: str, found: str) -> None:
    document = parse(f'{{"scores": [{{"a": {score}}}]}}'.encode())
    with pytest.raises(WireError, match=re.escape(found)):
        read_scores(document, ("a",), 1)
