"""How to look at the history."""

from __future__ import annotations

import sys
from pathlib import Path

from model_core.documents import UserError


def ui_command(tracking_uri: str, *, host: str = "127.0.0.1", port: int = 5000) -> list[str]:
    """The command that serves MLflow's pages on a local database; UserError where a server runs already, or nothing was tracked yet."""
    if tracking_uri.startswith(("http://", "https://")):
        raise UserError(f"ui: {tracking_uri} is a server already; open it in a browser")
    if tracking_uri.startswith("sqlite:///") and not Path(tracking_uri.removeprefix("sqlite:///")).exists():
        raise UserError(f"ui: {tracking_uri} does not exist yet; a run writes it")
    return [
        *("env", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"),  # its workers serve prompt evaluation only, and double the time to start
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", tracking_uri),
        *("--host", host, "--port", str(port), "--workers", "1"),
    ]


def page_url(base_url: str, *, experiment_id: str | None = None) -> str:
    """The page to open; without the last part the interface may show its pages for language models."""
    place = "experiments" if experiment_id is None else f"experiments/{experiment_id}"
    return f"{base_url.rstrip('/')}/#/{place}?workflowType=machine_learning"
