"""`darkroom sample`: prompts, and pictures to edit, to PNG files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from model_core.documents import UserError
from model_core.recipe import CompressionRatio
from model_core.site import Site


def draw(
    site: Site,
    model: str,
    prompts: Sequence[str],
    *,
    images: Sequence[Path],
    seed: int,
    steps: int | None,
    size: str | None,
    output: Path,
) -> list[Path]:
    """Writes one PNG a prompt, all with the same seed and the same pictures to edit; returns their paths.

    Several prompts get numbers: sample-1.png, sample-2.png. Raises UserError for a mistake before any model is loaded.
    """
    size_px = None if size is None else parse_size(size)
    references = [read_image(path) for path in images]
    paths = output_paths(output, len(prompts))
    from model_core.sampling.published import sample_published

    drawn = sample_published(site, model, prompts, references=references, seed=seed, steps=steps, size_px=size_px)
    for path, image in zip(paths, drawn, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="PNG")
    return paths


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "96x64", which is width by height, or of "64"; raises UserError for anything else.

    A model whose condition encoder sees images allows multiples of 32 alone, which is checked once the model is found.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise UserError(f"sample: --size: found {text!r}; allowed are a side, as in 64, or WIDTHxHEIGHT, as in 96x64")
    width, height = int(match[1]), int(match[2] or match[1])
    if width % CompressionRatio or height % CompressionRatio or not width or not height:
        raise UserError(f"sample: --size: found {text!r}; allowed are multiples of {CompressionRatio} pixels")
    return height, width


def read_image(path: Path) -> Image.Image:
    """A picture file as RGB; raises UserError when it is none."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not a picture that Pillow reads"
        raise UserError(f"sample: --image: found {path}; allowed is a picture file ({reason})") from error


def output_paths(output: Path, count: int) -> list[Path]:
    """Where the pictures go; raises UserError when that is no PNG file."""
    if output.suffix.lower() != ".png" or output.is_dir():
        raise UserError(f"sample: --out: found {str(output)!r}; allowed is a file that ends in .png")
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{number}") for number in range(1, count + 1)]
