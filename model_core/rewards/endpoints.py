"""What the reward service answers at each path, whatever it scores with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from model_core.rewards.answers import AnswerBook, KeyConflict
from model_core.rewards.batching import Answer, Batcher, QueueFull
from model_core.rewards.metrics import CONTENT_TYPE, Metrics
from model_core.rewards.verdict import Invalid, RewardUnavailable, Scorer, ScoreRequest
from model_core.rewards.wire import MAX_BODY_BYTES, SCORE_PATH, WireError, content_digest, parse, read_request, score_document

LINGER_SECONDS = 0.005  # that a picture waits for others to be scored with
QUEUE_PICTURES = 1024
KEPT_ANSWERS = 16_384  # a few hundred bytes each; a rollout of 32 prompts and 16 pictures each is 512
RETRY_SECONDS = 1  # what Retry-After says


class Refused(Exception):
    """A POST that gets no scores: the HTTP status and why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class _Asked:
    names: Sequence[str]
    requests: Sequence[ScoreRequest]
    digests: Sequence[str]


class RewardService:
    """A scorer, when it is there, with its queue, the answers it gave and what it counted."""

    def __init__(self, *, batch_size: int) -> None:
        self._batch_size = batch_size
        self._batcher: Batcher | None = None
        self._book: AnswerBook | None = None
        self._closing = False
        self.names: tuple[str, ...] = ()
        self.metrics = Metrics(
            queue_depth=lambda: self._batcher.depth if self._batcher else 0, cache_hits=lambda: self._book.num_hits if self._book else 0
        )

    @property
    def is_ready(self) -> bool:
        """Whether it scores: it is open, and not told to stop."""
        return self._book is not None and not self._closing

    def open(self, scorer: Scorer) -> None:
        """Begins to score."""
        self.names = tuple(scorer.names)
        self._batcher = Batcher(
            scorer,
            batch_size=self._batch_size,
            linger_seconds=LINGER_SECONDS,
            queue_size=QUEUE_PICTURES,
            scored=self._count,
        )
        self._book = AnswerBook(self._batcher.submit, capacity=KEPT_ANSWERS)

    async def close(self) -> None:
        """Finishes the batch at hand and refuses the rest."""
        self._closing = True
        if self._batcher is not None:
            await asyncio.to_thread(self._batcher.close)

    async def answer(self, body: bytes) -> dict[str, object]:
        """The answer to a POST. Raises Refused."""
        if self._book is None:
            raise Refused(503, "the models are being loaded")
        try:
            asked = await asyncio.to_thread(self._read, body)
            futures = self._book.ask(asked.requests, asked.digests)
        except WireError as error:
            raise Refused(400, str(error)) from error
        except KeyConflict as error:
            raise Refused(409, str(error)) from error
        except (QueueFull, RewardUnavailable) as error:
            raise Refused(503, str(error)) from error
        answers = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        scores = []
        for answer in answers:
            if isinstance(answer, RewardUnavailable):
                raise Refused(503, str(answer)) from answer
            if isinstance(answer, BaseException):
                raise Refused(500, f"{type(answer).__name__}: {answer}") from answer
            scores.append({name: score_document(answer[name]) for name in asked.names})
        return {"scores": scores}

    def _read(self, body: bytes) -> _Asked:
        document = parse(body)
        if not isinstance(document, dict) or not all(isinstance(document.get(name), list) for name in ("rewards", "requests")):
            raise WireError("found no mapping with the lists rewards and requests")
        unknown = [str(name) for name in document["rewards"] if name not in self.names]
        if unknown or not document["rewards"]:
            raise WireError(f"found the rewards {', '.join(unknown) or 'none'}; allowed are {', '.join(self.names)}")
        if len(document["requests"]) > QUEUE_PICTURES:
            raise Refused(413, f"found {len(document['requests'])} pictures; allowed are {QUEUE_PICTURES}")
        requests = [read_request(part) for part in document["requests"]]
        return _Asked(document["rewards"], requests, [content_digest(part) for part in document["requests"]])

    def _count(self, answers: Sequence[Answer]) -> None:
        invalid = [(name, score.reason) for answer in answers for name, score in answer.items() if isinstance(score, Invalid)]
        self.metrics.scored(len(answers), invalid)


def application(service: RewardService) -> Starlette:
    """The service's paths."""

    async def score(http: Request) -> Response:
        started = None
        try:
            body = await _body(http)
            started = time.monotonic()
            response: Response = JSONResponse(await service.answer(body))
        except Refused as refused:
            headers = {"Retry-After": str(RETRY_SECONDS)} if refused.status == 503 else {}
            response = JSONResponse({"error": str(refused)}, status_code=refused.status, headers=headers)
        service.metrics.answered(response.status_code, 0.0 if started is None else time.monotonic() - started)
        return response

    async def alive(_http: Request) -> Response:
        return PlainTextResponse("alive\n")

    async def ready(_http: Request) -> Response:
        return JSONResponse({"ready": service.is_ready, "rewards": list(service.names)}, status_code=200 if service.is_ready else 503)

    async def metrics(_http: Request) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    return Starlette(
        routes=[
            Route(SCORE_PATH, score, methods=["POST"]),
            Route("/healthz", alive),
            Route("/readyz", ready),
            Route("/metrics", metrics),
        ]
    )


async def _body(http: Request) -> bytes:
    """The whole body; refused as soon as it is known to be too large."""
    pieces, num = [], 0
    announced = http.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > MAX_BODY_BYTES:
        raise Refused(413, f"found {announced} bytes; allowed are {MAX_BODY_BYTES}")
    try:
        async for piece in http.stream():
            pieces.append(piece)
            num += len(piece)
            if num > MAX_BODY_BYTES:
                raise Refused(413, f"found more than the {MAX_BODY_BYTES} bytes that are allowed")
    except ClientDisconnect as error:
        raise Refused(400, "found half a request") from error
    return b"".join(pieces)
