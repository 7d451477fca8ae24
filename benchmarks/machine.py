"""On what, and of what, a measurement was taken."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch


def machine() -> dict[str, object]:
    """For the first line of a result; the load average tells of other work, which all figures suffer from."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "commit": commit.strip() or None,  # a copy without history has none
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks.{Path(sys.argv[0]).stem}",
        "cores": len(os.sched_getaffinity(0)),
        "gibibytes": round(gibibytes, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
    }
