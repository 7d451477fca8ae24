"""A reward service of this process, what it scores with, and servers that answer what they are told to."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from PIL import Image

from model_core.rewards.endpoints import RewardService, application
from model_core.rewards.service import Server
from model_core.rewards.verdict import Invalid, Score, ScoreRequest, Value
from model_core.rewards.wire import SCORE_PATH, request_document


class Brightness:
    """Two rewards of a picture's first pixel: its red; its green, invalid where that is 0. Waits before each batch while held."""

    names = ("red", "green")

    def __init__(self) -> None:
        self.batches: list[list[ScoreRequest]] = []
        self.begun = threading.Semaphore(0)
        self._go = threading.Event()
        self._go.set()
        self.failure: Exception | None = None

    def hold(self) -> None:
        self._go.clear()

    def release(self) -> None:
        self._go.set()

    @property
    def keys(self) -> list[str]:
        return [request.key for batch in self.batches for request in batch]

    def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
        self.batches.append(list(requests))
        self.begun.release()
        assert self._go.wait(30)
        if self.failure is not None:
            raise self.failure
        return [self._score(request.image.getpixel((0, 0))) for request in requests]

    def _score(self, pixel: Any) -> dict[str, Score]:
        return {"red": Value(pixel[0] / 255, 0.25), "green": Value(float(pixel[1])) if pixel[1] else Invalid("no green")}


def picture_request(key: str, *, red: int = 100, green: int = 50, **parts: Any) -> ScoreRequest:
    return ScoreRequest(key=key, prompt=parts.pop("prompt", "a prompt"), image=Image.new("RGB", (4, 4), (red, green, 0)), **parts)


@contextmanager
def running(scorer: Any, *, port: int = 0, batch_size: int = 4, is_open: bool = True) -> Iterator[tuple[str, RewardService]]:
    """The uri of a service, and the service."""
    listener = socket.create_server(("127.0.0.1", port))
    service = RewardService(batch_size=batch_size)
    server = Server(service, uvicorn.Config(application(service), log_level="warning", access_log=False, lifespan="off"))
    if is_open:
        service.open(scorer)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
    finally:
        if isinstance(scorer, Brightness):
            scorer.release()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def answering(*answers: bytes | Callable[[socket.socket], None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives its answers in turn, the last for ever, one connection after the other; its uri, and what it was sent."""
    listener = socket.create_server(("127.0.0.1", 0))
    heard: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                heard.append(_whole_request(connection))
                answer = answers[min(len(heard), len(answers)) - 1]
                if callable(answer):
                    answer(connection)
                else:
                    connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", heard
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(20)


def http_answer(body: bytes, *, status: int = 200, headers: str = "") -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def post(uri: str, body: bytes, *, headers: dict[str, str] | None = None) -> tuple[int, Any, http.client.HTTPMessage]:
    """Status, answer and headers of a POST."""
    connection = http.client.HTTPConnection(uri.removeprefix("http://"), timeout=20)
    try:
        connection.request("POST", SCORE_PATH, body=body, headers=headers or {})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers
    finally:
        connection.close()


def get(uri: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(uri.removeprefix("http://"), timeout=20)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def body_of(*requests: ScoreRequest, rewards: Sequence[str] = ("red", "green")) -> bytes:
    return json.dumps({"rewards": list(rewards), "requests": [request_document(request) for request in requests]}).encode()


def _whole_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < size:
        body += connection.recv(65536)
    return body
