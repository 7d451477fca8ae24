"""What `darkroom sample` is asked to draw: from the command line or from a file with a request a line, checked before any work."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from model_core.documents import UserError, describe
from model_core.recipe import CompressionRatio


@dataclass(frozen=True)
class PictureRequest:
    """A picture to draw and the file that it goes to. `size_px` is (height, width); None leaves it to the model."""

    prompt: str
    seed: int
    size_px: tuple[int, int] | None
    references: Sequence[Image.Image]
    path: Path


@dataclass(frozen=True)
class Defaults:
    """What the command line says of all pictures; a line of a file may say otherwise."""

    seed: int
    size_px: tuple[int, int] | None
    references: Sequence[Image.Image]
    output: Path


def defaults(*, seed: int, size: str | None, images: Sequence[Path], output: Path) -> Defaults:
    """The options of the command line; raises UserError for a mistake in one."""
    size_px = None if size is None else parse_size(size, where="--size")
    references = [read_image(path, where="--image") for path in images]
    check_output(output, where="--out")
    return Defaults(seed, size_px, references, output)


def requests_of(prompts: Sequence[str], given: Defaults) -> list[PictureRequest]:
    """One picture a prompt, all with the same seed and references."""
    paths = output_paths(given.output, len(prompts))
    return [PictureRequest(prompt, given.seed, given.size_px, given.references, path) for prompt, path in zip(prompts, paths, strict=True)]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1)]
    images: list[str] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    size: str | None = None
    out: str | None = None

    @field_validator("size", mode="before")
    @classmethod
    def _side(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def read_requests(file: Path, given: Defaults) -> list[PictureRequest]:
    """The pictures of a batch file: JSON Lines, told by its name or its first sign, else a prompt a line; empty lines are skipped.

    Its paths are relative to its folder. What a line does not say is as `given`; pictures without a file of their own are numbered by
    their place. Raises UserError, naming file and line, for the first mistake.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"sample: --file: {file} cannot be read ({reason}); allowed is a file with a request a line") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"sample: --file: {file} holds no request; allowed is a request a line")
    is_json = file.suffix == ".jsonl" or lines[0][1].startswith("{")
    paths = output_paths(given.output, len(lines))
    requests = []
    taken: dict[Path, int] = {}
    for (number, line), path in zip(lines, paths, strict=True):
        where = f"{file}:{number}"
        request = _request(_parse(line, where), path, given, where=where, folder=file.parent) if is_json else None
        requests.append(request or PictureRequest(line, given.seed, given.size_px, given.references, path))
        place = requests[-1].path.resolve()
        if place in taken:
            raise UserError(f"sample: {where}: out: found {requests[-1].path}, as in line {taken[place]}; allowed is a file a picture")
        taken[place] = number
    return requests


def _parse(line: str, where: str) -> _Line:
    try:
        return _Line.model_validate(json.loads(line))
    except json.JSONDecodeError as error:
        raise UserError(f'sample: {where}: not JSON ({error.msg}); allowed is an object a line, as {{"prompt": "a cat"}}') from error
    except ValidationError as error:
        raise UserError(describe(error, f"sample: {where}")) from error


def _request(line: _Line, path: Path, given: Defaults, *, where: str, folder: Path) -> PictureRequest:
    if line.out is not None:
        path = folder / line.out
        check_output(path, where=f"{where}: out")
    return PictureRequest(
        line.prompt,
        given.seed if line.seed is None else line.seed,
        given.size_px if line.size is None else parse_size(line.size, where=f"{where}: size"),
        given.references if line.images is None else [read_image(folder / name, where=f"{where}: images") for name in line.images],
        path,
    )


def parse_size(text: str, *, where: str) -> tuple[int, int]:
    """(height, width) of "96x64", which is width by height, or of "64"; raises UserError for anything else.

    A model whose condition encoder sees images allows multiples of 32 alone, which is checked once the model is found.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise UserError(f"sample: {where}: found {text!r}; allowed are a side, as in 64, or WIDTHxHEIGHT, as in 96x64")
    width, height = int(match[1]), int(match[2] or match[1])
    if width % CompressionRatio or height % CompressionRatio or not width or not height:
        raise UserError(f"sample: {where}: found {text!r}; allowed are multiples of {CompressionRatio} pixels")
    return height, width


def read_image(path: Path, *, where: str) -> Image.Image:
    """A picture file as RGB; raises UserError when it is none."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not a picture that Pillow reads"
        raise UserError(f"sample: {where}: found {path}; allowed is a picture file ({reason})") from error


def check_output(path: Path, *, where: str) -> None:
    """Raises UserError when a picture cannot be written there: no PNG file, or no folder that this account may write to."""
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"sample: {where}: found {str(path)!r}; allowed is a file that ends in .png")
    present = next(folder for folder in path.absolute().parents if folder.exists())
    if not (present.is_dir() and os.access(present, os.W_OK | os.X_OK)):
        raise UserError(f"sample: {where}: found {str(path)!r}; allowed is a file in a folder that can be written to, not {present}")


def output_paths(output: Path, count: int) -> list[Path]:
    """Where `count` pictures go: one to `output`, several to numbered files beside it."""
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{number}") for number in range(1, count + 1)]
