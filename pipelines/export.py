"""`darkroom export`: a published model as a folder that diffusers loads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from model_core.documents import UserError
from model_core.site import Site


@dataclass(frozen=True)
class Exported:
    """What was written, what could not be and why, and what the pipeline there does otherwise."""

    folder: str
    parts: list[str]
    left_out: dict[str, str] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Lines for people."""
        left_out = [f"left out {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join([f"wrote {self.folder}: {', '.join(self.parts)}", *left_out, *(f"note: {line}" for line in self.differences)])


def export(site: Site, model: str, folder: Path, *, parts: str | None) -> Exported:
    """Writes the model into `folder`, which must not exist or be empty, and appears whole or not at all.

    `parts` are names with commas between; None takes all, and leaves out those but the transformer that diffusers has no module for.
    Raises UserError for a mistake, and for a part asked for by name, or a transformer, that cannot be told there.
    """
    from model_core.models.diffusers_pipeline import PARTS, differences, write_pipeline

    wanted = list(PARTS) if parts is None else parse_parts(parts, list(PARTS))
    check_folder(folder)
    from model_core.sampling.published import find_published

    painter = find_published(site, model).load()
    with _new_folder(folder) as place:
        left_out = write_pipeline(painter, place, wanted)
        for name in left_out if parts is not None else left_out.keys() & {"transformer"}:
            raise UserError(f"export: {name}: {left_out[name]}")
    return Exported(str(folder), [name for name in wanted if name not in left_out], left_out, differences(painter))


def parse_parts(text: str, known: list[str]) -> list[str]:
    """The parts of "transformer,vae", in the order of `known`; raises UserError for another name."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"export: --parts: found {name!r}; allowed are {', '.join(known)}")
    return [name for name in known if name in names]


def check_folder(folder: Path) -> None:
    """Raises UserError unless the folder is free: not there, or empty."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"export: FOLDER: found {folder}, a file; allowed is a folder that is empty or not there yet")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"export: FOLDER: found {folder}, which is not empty; allowed is a folder that is empty or not there yet")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place when all went well, and is removed otherwise."""
    target = folder.resolve()
    place = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        place.mkdir(parents=True)
        yield place
        place.rename(target)
    except OSError as error:
        raise UserError(f"export: FOLDER: {folder} cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
