"""Rewards from a service: asked for again while it is away, and never made up."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import urlsplit

from model_core.data.keys import keyed_uniform
from model_core.rewards.verdict import RewardUnavailable, Score, ScoreRequest
from model_core.rewards.wire import POST_BYTES, POST_PICTURES, SCORE_PATH, WireError, parse, read_scores, request_document

PASSING_STATUS = (429, 502, 503, 504)  # of the service, or of what stands before it
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 5.0
SAY_EVERY_SECONDS = 60.0


class Away(Exception):
    """The service cannot be had at this moment; `retry_after` seconds is what it asked for."""

    def __init__(self, message: str, *, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class HTTPScorer:
    """The rewards `names` of the service at `uri` (http:// or https://).

    A request that meets nobody, a broken connection, silence for `timeout_seconds`, or one of PASSING_STATUS, is sent again with
    growing keyed pauses; the last attempt begins no later than `patience_seconds` after the first. `say` is told that it waits.
    """

    def __init__(
        self, uri: str, names: Sequence[str], *, timeout_seconds: float, patience_seconds: float, say: Callable[[str], None]
    ) -> None:
        self._uri = uri.rstrip("/")
        self._names = tuple(names)
        self._timeout_seconds = timeout_seconds
        self._patience_seconds = patience_seconds
        self._say = say

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards that it asks for."""
        return self._names

    def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
        """The service's scores. Raises RewardUnavailable when patience ends, or at once for any answer but just these scores."""
        return [scores for num, body in _posts(requests, self._names) for scores in self._post(num, body)]

    def _post(self, num: int, body: bytes) -> list[dict[str, Score]]:
        started = time.monotonic()
        said, attempt = float("-inf"), 0
        while True:
            try:
                answer = self._send(body)
                break
            except Away as error:
                waited = time.monotonic() - started
                pause = min(FIRST_PAUSE_SECONDS * 2**attempt, LONGEST_PAUSE_SECONDS) * (1 + keyed_uniform(self._uri, body, attempt)) / 2
                pause = max(pause, error.retry_after)
                if waited + pause > self._patience_seconds:
                    raise RewardUnavailable(
                        f"rewards at {self._uri}: none after {waited:.0f} s and {attempt + 1} attempts; the last one: {error}"
                    ) from error
                if time.monotonic() - said >= SAY_EVERY_SECONDS:
                    said = time.monotonic()
                    left = self._patience_seconds - waited
                    self._say(f"waiting for the rewards at {self._uri}, for up to {left:.0f} s more: {error}")
            time.sleep(pause)
            attempt += 1
        if attempt:
            self._say(f"the rewards at {self._uri} are back after {time.monotonic() - started:.0f} s")
        try:
            return read_scores(parse(answer), self._names, num)
        except WireError as error:
            raise RewardUnavailable(f"rewards at {self._uri}: {error}") from error

    def _send(self, body: bytes) -> bytes:
        """The bytes of a 200. Raises Away for what passes, RewardUnavailable for any other status."""
        place = urlsplit(self._uri)
        kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
        connection = kind(place.netloc, timeout=self._timeout_seconds)
        try:
            connection.request("POST", place.path + SCORE_PATH, body=body, headers={"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:  # refused, reset, silent, cut short
            raise Away(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if response.status == http.client.OK:
            return data
        told = f"HTTP {response.status}: {data[:300].decode(errors='replace')}"
        if response.status in PASSING_STATUS:
            after = response.headers.get("Retry-After", "")
            raise Away(told, retry_after=float(after) if after.isdecimal() else 0.0)
        raise RewardUnavailable(f"rewards at {self._uri}: {told}")


def _posts(requests: Sequence[ScoreRequest], names: Sequence[str]) -> Iterator[tuple[int, bytes]]:
    """(number of pictures, body) of each POST, none much larger than POST_BYTES."""
    parts: list[str] = []
    for request in requests:
        parts.append(json.dumps(request_document(request), allow_nan=False))
        if len(parts) == POST_PICTURES or sum(map(len, parts)) >= POST_BYTES:
            yield len(parts), _body(parts, names)
            parts = []
    if parts:
        yield len(parts), _body(parts, names)


def _body(parts: Sequence[str], names: Sequence[str]) -> bytes:
    return f'{{"rewards": {json.dumps(list(names))}, "requests": [{", ".join(parts)}]}}'.encode()
