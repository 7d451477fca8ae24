"""What this machine and a site lack to run a recipe, and how to mend it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from model_core.documents import UserError
from model_core.site import Site

PACKAGES = ("torch", "transformers", "safetensors", "pyarrow", "pillow", "kfp", "mlflow", "boto3", "pydantic")
LEAST_FREE_BYTES = 5 * 2**30  # the demo leaves well under this
TIMEOUT_SECONDS = 5.0
MENDS = {
    "s3": "check the site's s3.endpoint_url, and the AWS credentials in the environment",
    "workspace": "name another folder as the site's workspace",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: whether it is well, what was found, and how to mend it when it is not."""

    name: str
    is_well: bool
    found: str
    mend: str = ""


def examine(site: Site) -> list[Check]:
    """Every check, in the order in which one would mend things."""
    checks: tuple[Callable[[Site], Check], ...] = (_python, _packages, _cores, _disk, _fonts, _workspace, _tracking)
    return [check(site) for check in checks]


def _python(_site: Site) -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    return Check("python", sys.version_info >= (3, 11), f"{found} at {sys.executable}", "install Python 3.11 or newer, then `make setup`")


def _packages(_site: Site) -> Check:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    return Check("packages", not missing, f"missing: {', '.join(missing)}" if missing else ", ".join(found), "`make setup`")


def _cores(_site: Site) -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("cores", cores >= 2, f"{cores}", "the recipes smoke and demo expect two cores; with one they take about twice as long")


def _disk(site: Site) -> Check:
    folder = site.scratch_folder
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{free / 2**30:.1f} GiB free at {folder}"
    mend = f"free {LEAST_FREE_BYTES // 2**30} GiB there, or name another folder as the site's scratch"
    return Check("disk", free >= LEAST_FREE_BYTES, found, mend)


def _fonts(_site: Site) -> Check:
    there = importlib.util.find_spec("mplfonts") is not None
    return Check("fonts", there, "mplfonts" if there else "no font with Chinese glyphs", "`make setup`, or pip install 'darkroom[demo]'")


def _workspace(site: Site) -> Check:
    from pipelines.run import check_workspace

    name = "s3" if site.workspace_uri.startswith("s3://") else "workspace"
    try:
        check_workspace(site)
    except UserError as error:
        return Check(name, False, str(error), MENDS[name])
    return Check(name, True, f"{site.workspace_uri} can be written to")


def _tracking(site: Site) -> Check:
    uri = site.tracking_uri
    if uri.startswith("sqlite:///"):
        return Check("tracking", True, f"{uri} (made by the first run)" if not Path(uri.removeprefix("sqlite:///")).exists() else uri)
    if not uri.startswith("http"):
        return Check("tracking", True, f"{uri.partition('://')[0]}: not contacted")
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=TIMEOUT_SECONDS) as answer:
            return Check("tracking", answer.status == 200, f"{uri} answers {answer.status}", "look at the server's log")
    except (urllib.error.URLError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        mend = "start it, or correct the site's tracking.uri; runs go on without it and tell it later"
        return Check("tracking", False, f"{uri} does not answer ({reason})", mend)
