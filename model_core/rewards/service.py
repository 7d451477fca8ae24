"""The reward service: scorers behind HTTP, for trainers that wait for them or run beside them. docs/reference/reward-service.md.

`python -m model_core.rewards.service --recipe R --site S --input NAME=MANIFEST --port N`. Exit codes are those of `python -m model_core`.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import uvicorn

from model_core.documents import UserError
from model_core.exit_codes import DONE, tell_error
from model_core.manifest import Manifest
from model_core.recipe import Recipe, load_recipe
from model_core.rewards.endpoints import RewardService, application
from model_core.rewards.opening import served_scorer
from model_core.rewards.verdict import Scorer
from model_core.site import Site, load_site
from model_core.workspace import read_input

MakeScorer = Callable[[Recipe, Site, Mapping[str, Manifest]], Scorer]


def main(arguments: Sequence[str] | None = None, *, make_scorer: MakeScorer = served_scorer) -> int:
    """Serves what `make_scorer` makes until SIGTERM; returns the exit code. It listens at once, and is ready when that is made."""
    parser = argparse.ArgumentParser(prog="python -m model_core.rewards.service", description="Serves rewards over HTTP.")
    parser.add_argument("--recipe", type=Path, required=True, help="recipe YAML: what is trained")
    parser.add_argument("--site", type=Path, required=True, help="site YAML: where to run")
    parser.add_argument("--input", action="append", default=[], metavar="NAME=MANIFEST", help="manifest of a reward model; may be repeated")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 in a pod")
    parser.add_argument("--port", type=int, required=True, help="port to listen at; 0 takes a free one")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures that are scored at once")
    parser.add_argument("--announce", type=Path, help="file that the service's uri is written to when it is ready")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _stop)
    try:
        if options.batch_size < 1:
            raise UserError(f"--batch-size: found {options.batch_size}; allowed are 1 and more")
        site = load_site(options.site)
        recipe = load_recipe(options.recipe)
        inputs = dict(read_input(text, site) for text in options.input)
        serve(
            lambda: make_scorer(recipe, site, inputs),
            host=options.host,
            port=options.port,
            batch_size=options.batch_size,
            announce=options.announce,
        )
    except Exception as error:  # noqa: BLE001 - whatever a model raises is told and becomes an exit code
        return tell_error(error, who="rewards")
    return DONE


def serve(make_scorer: Callable[[], Scorer], *, host: str, port: int, batch_size: int, announce: Path | None) -> None:
    """Serves until SIGTERM or SIGINT. Raises UserError for a port that cannot be had, and whatever `make_scorer` raises."""
    try:
        listener = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port: found {port} at {host}, which cannot be listened at ({error}); allowed is a free port") from error
    uri = f"http://{host}:{listener.getsockname()[1]}"
    service = RewardService(batch_size=batch_size)
    server = Server(service, uvicorn.Config(application(service), log_level="warning", access_log=False, lifespan="off"))
    failures: list[Exception] = []

    def load() -> None:
        try:
            service.open(make_scorer())
            print(f"rewards: {uri} gives {', '.join(service.names)}", flush=True)
            if announce is not None:
                unfinished = announce.with_name(f".{announce.name}")
                unfinished.write_text(uri, encoding="utf-8")
                unfinished.replace(announce)
        except Exception as error:  # noqa: BLE001 - raised again by the main thread
            failures.append(error)
            server.should_exit = True

    threading.Thread(target=load, name="loading", daemon=True).start()
    server.run(sockets=[listener])
    if failures:
        raise failures[0]


class Server(uvicorn.Server):
    """uvicorn, which on SIGTERM takes no new connections and answers those it has: here, after the batch at hand."""

    def __init__(self, service: RewardService, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._service.close()
        await super().shutdown(sockets)


def _stop(_signal: int, _frame: FrameType | None) -> NoReturn:
    """uvicorn raises the signal again when it has ended in good order; before it begins there is nothing to end."""
    sys.exit(DONE)


if __name__ == "__main__":
    sys.exit(main())
