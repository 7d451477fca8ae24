"""`darkroom label`: finds pairs that wait for people, and serves the page until Ctrl-C."""

from __future__ import annotations

import getpass
import json
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model_core.data.preferences import FILE_NAME, Preference, read_preferences
from model_core.documents import UserError
from model_core.recipe import DIMENSIONS, Dimension
from model_core.results import find_result
from model_core.site import Site
from model_core.workspace import InputFolder, Workspace
from pipelines.labelling.server import LabellingServer
from pipelines.labelling.session import LabellingSession
from pipelines.labelling.votes_file import VotesFile

STEP = "build_preferences"
MAX_NAME = 100


@dataclass(frozen=True)
class Opened:
    """A page that is about to be served: its address, the votes file, and how many pairs it shows, with a vote or without."""

    url: str
    votes: str
    pairs: int
    labelled: int


def label(
    site: Site,
    place: str,
    *,
    dimension: str,
    annotator: str | None,
    votes: Path,
    port: int,
    all_pairs: bool,
    say: Callable[[str], None],
    on_opened: Callable[[Opened], None],
) -> None:
    """Serves the page for the pairs of `place` until Ctrl-C. Raises UserError, with nothing written, for a mistake of the user's."""
    asked = check_dimension(dimension)
    name = check_annotator(annotator)
    pairs = find_pairs(site, place, dimension=asked, all_pairs=all_pairs)
    with LabellingServer(port=port) as server:
        file = VotesFile(votes)
        try:
            if file.repaired is not None:
                say(f"repaired: {file.repaired}")
            session = server.session = LabellingSession(pairs, dimension=asked, annotator=name, votes=file)
            on_opened(Opened(url=server.url, votes=str(file.path), pairs=session.num_pairs, labelled=len(session.latest())))
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                say(summary(session, file.path))
        finally:
            file.close()


def summary(session: LabellingSession, path: Path) -> str:
    """What was done, and how a run takes it up."""
    assignment = shlex.quote("preferences.votes=" + json.dumps([str(path)], ensure_ascii=False))
    return (
        f"\n{session.num_written} votes written to {path}; {len(session.latest())} of {session.num_pairs} pairs have yours\n"
        f"a run takes them up with: darkroom run RECIPE --set {assignment}"
    )


def find_pairs(site: Site, place: str, *, dimension: Dimension, all_pairs: bool) -> list[Preference]:
    """The pairs to show, in the file's order. Raises UserError where there are none."""
    missing = "this run has not built its preference pairs yet"
    manifest = find_result(Workspace(site), place, step=STEP, what="label", missing=missing)
    counts: Counter[tuple[str, bool]] = Counter()
    pairs = []
    for pair in read_preferences(InputFolder(manifest, site=site).path(FILE_NAME)):
        waits = pair.label == "unlabelled"
        counts[pair.dimension, waits] += 1
        if pair.dimension == dimension and (waits or all_pairs):
            pairs.append(pair)
    if not pairs:
        waiting = [f"{name} {counts[name, True]}" for name in DIMENSIONS if counts[name, True]]
        known = counts[dimension, False]
        more = f", and --all shows the {known} that have a label" if known else ""
        raise UserError(f"label {place}: no pair of {dimension} waits for people; waiting are {', '.join(waiting) or 'none'}{more}")
    return pairs


def check_dimension(name: str) -> Dimension:
    """The dimension of that name; raises UserError when there is none."""
    for dimension in DIMENSIONS:
        if dimension == name:
            return dimension
    raise UserError(f"label: --dimension: found {name!r}; allowed are {', '.join(DIMENSIONS)}")


def check_annotator(name: str | None) -> str:
    """The name that votes carry: as given, or the account's. Raises UserError where there is none that will do."""
    if name is None:
        try:
            name = getpass.getuser()
        except (KeyError, OSError) as error:
            raise UserError("label: --annotator: this account has no name; allowed is any, as in --annotator ana") from error
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise UserError(f"label: --annotator: found {name!r}; allowed are up to {MAX_NAME} printable characters")
    return name.strip()


def opened_text(opened: Opened) -> str:
    """What the terminal shows while the page is open."""
    return f"{opened.url} (Ctrl-C ends it)\n{opened.labelled} of {opened.pairs} pairs have your vote; votes go to {opened.votes}"
