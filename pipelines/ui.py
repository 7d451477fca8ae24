"""MLflow's web page on a site's history."""

from __future__ import annotations

import subprocess
import sys

import typer

from model_core.site import Site
from model_core.tracking.ui import page_url, ui_command


def serve(site: Site, *, port: int) -> int:
    """Serves a local history on 127.0.0.1 until Ctrl-C, and returns the exit code; of a tracking server it names the page."""
    uri = site.tracking_uri
    drain = [sys.executable, "-m", "model_core.tracking.drain", "--spool", str(site.spool_folder), "--uri", uri]
    subprocess.run(drain, check=False)  # what earlier runs could not tell; its own lines say what went wrong
    if uri.startswith("http"):
        typer.echo(page_url(uri))
        return 0
    command = ui_command(uri, port=port)
    typer.echo(f"{page_url(f'http://127.0.0.1:{port}')} (Ctrl-C ends it)")
    try:
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        return 0
