"""Which code runs: what a manifest says of it."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import version
from pathlib import Path

from model_core.manifest import Code


def code_version() -> Code:
    """The code that runs: package version, git commit of the checkout, image digest as the site's platform tells it."""
    sha = os.environ.get("DARKROOM_GIT_SHA") or _git_sha()
    return Code(version=version("darkroom"), git_sha=sha, image_digest=os.environ.get("DARKROOM_IMAGE_DIGEST"))


def _git_sha() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git on this machine
    return found.stdout.strip() if found.returncode == 0 else None
