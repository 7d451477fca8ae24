"""A proxy between a store and its server that does, to chosen requests, what networks and servers do."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

Fault = Callable[["Exchange"], None]


@dataclass
class Exchange:
    """One request on a connection of its own. A fault reads it, forwards it or not, and answers or not."""

    client: socket.socket
    upstream: tuple[str, int]
    head: bytes
    begun: bytes  # what of the body came with the head

    def body(self, *, limit: int | None = None, pause_seconds: float = 0.0) -> bytes:
        """The request's body, or at least `limit` bytes of it, read in pieces with a pause after each."""
        lines = self.head.lower().split(b"\r\n")
        length = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)
        if b"100-continue" in self.head.lower():
            self.client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.begun
        while len(body) < (length if limit is None else min(limit, length)):
            piece = self.client.recv(1 << 16)
            if not piece:
                raise ConnectionAbortedError("the client went away")
            body += piece
            time.sleep(pause_seconds)
        return body

    def forward(self, body: bytes) -> bytes:
        """The server's whole answer."""
        lines = [line for line in self.head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        with socket.create_connection(self.upstream) as server:
            server.sendall(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n")
            answer = b""
            if b"100-continue" in self.head.lower():  # a server that refuses says so now, and reads no body
                while b"\r\n\r\n" not in answer:
                    answer += server.recv(1 << 20)
            if not answer or answer.startswith(b"HTTP/1.1 100"):
                answer = answer.partition(b"\r\n\r\n")[2]
                with suppress(BrokenPipeError, ConnectionResetError):  # a server may refuse in the middle; its answer is there
                    server.sendall(body)
            with suppress(ConnectionResetError):
                while piece := server.recv(1 << 20):
                    answer += piece
            return answer

    def reset(self) -> None:
        """Ends the connection the hard way."""
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.close()


def answer(status: int, code: str = "") -> Fault:
    """The server refuses: the request does not reach it."""

    def fault(exchange: Exchange) -> None:
        exchange.body()
        document = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode() if code else b""
        head = (
            f"HTTP/1.1 {status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(document)}\r\nConnection: close\r\n\r\n"
        )
        exchange.client.sendall(head.encode() + document)

    return fault


def slow(exchange: Exchange) -> None:
    """A link of some 3 MiB/s."""
    exchange.client.sendall(exchange.forward(exchange.body(pause_seconds=0.02)))


def reset(exchange: Exchange) -> None:
    """The connection breaks while the body is sent."""
    exchange.body(limit=1 << 20)
    exchange.reset()


def lose_answer(exchange: Exchange) -> None:
    """The server does what it was asked, and nobody hears of it."""
    exchange.forward(exchange.body())


def cut_answer(exchange: Exchange) -> None:
    """The answer breaks off in the middle of its body."""
    whole = exchange.forward(exchange.body())
    start = whole.index(b"\r\n\r\n") + 4
    exchange.client.sendall(whole[: start + (len(whole) - start) // 2])


def flip_sent_byte(exchange: Exchange) -> None:
    """One byte of the request's body is another one on arrival."""
    exchange.client.sendall(exchange.forward(_flipped(exchange.body(), at=1000)))


def flip_received_byte(exchange: Exchange) -> None:
    """One byte of the answer's body is another one on arrival."""
    whole = exchange.forward(exchange.body())
    exchange.client.sendall(_flipped(whole, at=whole.index(b"\r\n\r\n") + 4 + 1000))


def _flipped(data: bytes, *, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@dataclass
class Plan:
    """Which requests meet a fault."""

    fault: Fault
    start: bytes  # of the request line, such as b"PUT "
    part: bytes  # somewhere in the request line, such as b"partNumber=2"
    times: float
    met: int = field(default=0)


class Proxy:
    """Forwards to `upstream`; requests that a plan names meet its fault."""

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.removeprefix("http://").partition(":")
        self._upstream = (host, int(port))
        self._listener = socket.socket()
        # A small buffer, taken over by each connection: else a slow reader would not be felt by the sender.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(64)
        self._lock = threading.Lock()
        self._plans: list[Plan] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def plan(self, fault: Fault, *, start: bytes, part: bytes = b"", times: float = 1) -> Plan:
        """Let the next `times` requests that match meet `fault`."""
        self._plans.append(Plan(fault, start, part, times))
        return self._plans[-1]

    def close(self) -> None:
        """No new connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            client.settimeout(30)
            request = b""
            while b"\r\n\r\n" not in request:
                piece = client.recv(1 << 16)
                if not piece:
                    return
                request += piece
            head, _, begun = request.partition(b"\r\n\r\n")
            try:
                self._fault(head.split(b"\r\n")[0])(Exchange(client, self._upstream, head, begun))
            except OSError:  # one of the two sides is gone, and the other one notices
                return

    def _fault(self, line: bytes) -> Fault:
        with self._lock:
            for plan in self._plans:
                if line.startswith(plan.start) and plan.part in line and plan.met < plan.times:
                    plan.met += 1
                    return plan.fault
        return pass_on


def pass_on(exchange: Exchange) -> None:
    """No fault."""
    exchange.client.sendall(exchange.forward(exchange.body()))
