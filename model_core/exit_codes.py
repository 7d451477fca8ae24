"""How a process of this library ends: what a launcher may conclude from its exit code, and what is said of an error."""

from __future__ import annotations

import sys
import traceback

from model_core.documents import UserError
from model_core.rewards.verdict import RewardUnavailable
from model_core.storage import StorageError
from model_core.training.guard import TrainingDiverged
from model_core.training.stopping import Stopped

DONE = 0
CONFIGURATION = 10  # running it again changes nothing
INFRASTRUCTURE = 20  # running it again goes on
FAILED = 30


def tell_error(error: Exception, *, who: str) -> int:
    """Says on standard error what ended `who`, and returns the exit code: a sentence for what is foreseen, else the traceback."""
    if isinstance(error, UserError | TrainingDiverged):
        print(f"{who}: {error}", file=sys.stderr, flush=True)
        return CONFIGURATION if isinstance(error, UserError) else FAILED
    if isinstance(error, StorageError | RewardUnavailable | Stopped):
        print(f"{who}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return INFRASTRUCTURE
    traceback.print_exception(error)
    return FAILED
