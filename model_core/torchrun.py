"""`python -m model_core.torchrun N STEP ...`: the step `python -m model_core STEP ...` as N ranks of this machine.

torchrun starts and watches the ranks, and ends all when one fails. It gives back 1 whatever the cause: here the exit code of
the first rank that failed is kept, which tells a caller whether a second try makes sense.
"""

from __future__ import annotations

import os
import sys
import uuid

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

INFRASTRUCTURE = 20  # exit code: run it again


def main(arguments: list[str]) -> int:
    """Runs the ranks to their end; returns 0, or the exit code of the first that failed: 20 when a signal ended it."""
    num, *step = arguments
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(num))))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(num),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        max_restarts=0,  # whoever started this knows when a second try makes sense
    )
    try:
        elastic_launch(config, sys.executable)("-m", "model_core", *step)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        print(f"rank {rank} was killed by signal {-failure.exitcode}", file=sys.stderr, flush=True)
        return INFRASTRUCTURE
    except SignalException:  # SIGTERM, which the ranks have been given too
        return INFRASTRUCTURE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
