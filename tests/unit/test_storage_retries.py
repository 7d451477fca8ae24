"""How long a request is sent again, on a clock that only sleeping moves."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, IncompleteReadError, NoCredentialsError

from model_core.storage.s3_connection import repeated


class Clock:
    """Seconds since the start, and the pauses that were made."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "sleep", clock.sleep)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def failing_until(clock: Clock, second: float, error: Exception) -> Callable[[], str]:
    def request() -> str:
        if clock.now < second:
            raise error
        return "answer"

    return request


def refused(status: int, code: str = "") -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


AWAY = EndpointConnectionError(endpoint_url="http://store")


@pytest.mark.parametrize(
    "error",
    [AWAY, refused(503, "SlowDown"), refused(500), refused(400, "BadDigest"), IncompleteReadError(actual_bytes=1, expected_bytes=2)],
)
def test_server_that_is_away_for_half_a_minute_is_waited_for(clock: Clock, error: Exception) -> None:
    for _ in range(100):
        clock.now = 0
        assert repeated(failing_until(clock, 30, error), seconds=60) == "answer"
        assert clock.now < 36


def test_last_attempt_begins_before_the_time_is_up(clock: Clock) -> None:
    with pytest.raises(EndpointConnectionError):
        repeated(failing_until(clock, 1000, AWAY), seconds=60)
    assert 54 < clock.now <= 60


def test_pauses_grow_to_five_seconds_and_differ_between_processes(clock: Clock) -> None:
    for _ in range(2):
        with pytest.raises(EndpointConnectionError):
            repeated(failing_until(clock, 1e9, AWAY), seconds=clock.now + 60)
    assert clock.pauses[0] <= 0.2
    assert 2.5 <= clock.pauses[8] <= 5
    assert clock.pauses[8] != clock.pauses[len(clock.pauses) // 2 + 8]


@pytest.mark.parametrize(
    "error", [refused(403, "InvalidAccessKeyId"), refused(400, "ExpiredToken"), refused(404), refused(412), NoCredentialsError()]
)
def test_what_will_not_pass_is_not_asked_again(clock: Clock, error: Exception) -> None:
    with pytest.raises(type(error)):
        repeated(failing_until(clock, 1, error), seconds=60)
    assert clock.pauses == []


def test_zero_seconds_mean_one_attempt(clock: Clock) -> None:
    with pytest.raises(EndpointConnectionError):
        repeated(failing_until(clock, 1, AWAY), seconds=0)
    assert clock.pauses == []
