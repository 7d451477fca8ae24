"""SIGTERM during a training loop."""

from __future__ import annotations

import os
import signal

import pytest

from model_core.training.distributed import Ranks
from model_core.training.stopping import Stopped, noting_sigterm


class Delivered(Exception):
    """What the handler set before the loop raises."""


@pytest.fixture(autouse=True)
def handler_before(monkeypatch: pytest.MonkeyPatch):
    def deliver(_signal: int, _frame: object) -> None:
        raise Delivered

    before = signal.signal(signal.SIGTERM, deliver)
    yield deliver
    signal.signal(signal.SIGTERM, before)


def loop(done: list[int], *, stop_at: int, failure: Exception | None = None) -> None:
    """A training loop that is told to stop during step `stop_at`, and fails at its end where it should."""
    with noting_sigterm() as stopping:
        for step in range(5):
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            done.append(step)
            if failure is not None:
                raise failure
            if stopping.agreed(Ranks()):
                raise Stopped


def test_a_signal_is_noted_and_interrupts_nothing() -> None:
    done: list[int] = []
    with pytest.raises(Stopped):
        loop(done, stop_at=2)
    assert done == [0, 1, 2]


def test_without_a_signal_the_loop_goes_to_its_end_and_the_handler_is_back(handler_before) -> None:
    with noting_sigterm() as stopping:
        assert not stopping.agreed(Ranks())
    assert signal.getsignal(signal.SIGTERM) is handler_before


def test_a_signal_that_the_loop_has_not_heeded_goes_to_the_handler_before() -> None:
    with pytest.raises(Delivered), noting_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_failure_of_the_loop_is_not_hidden_by_a_signal(handler_before) -> None:
    with pytest.raises(ZeroDivisionError):
        loop([], stop_at=0, failure=ZeroDivisionError())
    assert signal.getsignal(signal.SIGTERM) is handler_before
