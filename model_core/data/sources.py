"""Sources of pictures: `synthetic://scenes`, `file:///FOLDER` and `s3://BUCKET/PREFIX`; what a folder holds is found out.

What is wrong with a source is said before any work begins (`check_sources`), and what it holds now enters the key of the
step that reads it (`source_fingerprint`), so that a changed folder is read anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from model_core.data.pixels import on_white
from model_core.documents import UserError
from model_core.recipe import Recipe
from model_core.site import Site
from model_core.storage import Storage, StorageError, open_storage

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
CONTAINER_SUFFIXES = (".parquet", ".tar")
CAPTION_FORMS = (
    "a .txt, .caption or .json file beside each picture, metadata.jsonl or metadata.csv with file_name and text, captions.json, "
    "parquet with image and text, or .tar with .txt beside each picture"
)
SCENES = "synthetic://scenes"
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class SourceFolder:
    """The files below a `file://` or `s3://` uri: size and version (a time or an etag) by relative path, sorted."""

    uri: str
    place: Path | Storage  # a folder of this machine, or a bucket's prefix
    files: dict[str, tuple[int, str]]

    @property
    def label(self) -> str:
        """What rows name as their origin: the uri of a bucket, the bare name of a folder, which may lie anywhere."""
        return self.place.name if isinstance(self.place, Path) else self.uri

    def with_suffix(self, *suffixes: str) -> list[str]:
        """Relative paths that end in one of `suffixes`, in any case."""
        return [path for path in self.files if path.lower().endswith(suffixes)]

    def read(self, path: str) -> bytes:
        """The bytes of a file."""
        return (self.place / path).read_bytes() if isinstance(self.place, Path) else self.place.get(path)

    def fetch(self, path: str, scratch: Path) -> Path:
        """A local copy of a file, below `scratch` when it is a bucket's, where the next one replaces it."""
        if isinstance(self.place, Path):
            return self.place / path
        scratch.mkdir(parents=True, exist_ok=True)
        copy = scratch / f"fetched{Path(path).suffix}"
        self.place.download(path, copy)
        return copy


def open_source(uri: str, site: Site) -> SourceFolder:
    """The files below `uri`, hidden ones left out. Raises UserError when there is no such folder, StorageError for a bucket's trouble."""
    if uri.startswith("s3://"):
        storage = open_storage(uri, site.s3)
        entries = {stat.path: (stat.size, stat.etag) for stat in storage.list() if not _hidden(stat.path)}
        return SourceFolder(uri.rstrip("/"), storage, entries)
    root = Path(unquote(uri.removeprefix("file://")))
    if not root.is_absolute():
        raise UserError(f"data.sources: found {uri!r}; allowed is an absolute folder, as in file:///my/photos")
    if not root.exists():
        raise UserError(f"data.sources: {uri}: no such folder")
    if not root.is_dir():
        raise UserError(f"data.sources: {uri}: found a file; allowed is the folder that it lies in")
    return SourceFolder(uri.rstrip("/"), root, dict(sorted(_walk(root, uri))))


def source_fingerprint(recipe: Recipe, site: Site) -> list[Any]:
    """What the recipe's folders hold now: [path, size, version] of every file, source by source."""
    folders = [open_source(uri, site) for uri in recipe.data.sources if uri != SCENES]
    return [[[path, *known] for path, known in folder.files.items()] for folder in folders]


def check_sources(recipe: Recipe, site: Site) -> None:
    """Raises UserError, in one sentence, when a source is missing, unreadable, unreachable or holds no captioned picture."""
    folders = [uri for uri in recipe.data.sources if uri != SCENES]
    if recipe.data.scenes.photo_background_share > 0 and not folders:
        raise UserError(
            f"data.scenes.photo_background_share: found {recipe.data.scenes.photo_background_share} with no photographs; "
            "allowed is 0, or a folder of photographs among data.sources"
        )
    for uri in folders:
        try:
            _check_folder(open_source(uri, site))
        except (StorageError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
            raise UserError(f"data.sources: {uri}: cannot be read ({reason})") from error


def _check_folder(folder: SourceFolder) -> None:
    from model_core.data.layouts import CAPTION_COLUMNS, IMAGE_COLUMNS, column, has_captions

    images, containers = folder.with_suffix(*IMAGE_SUFFIXES), folder.with_suffix(*CONTAINER_SUFFIXES)
    if not images and not containers:
        found = f"{len(folder.files)} files, none of them a picture" if folder.files else "nothing"
        raise UserError(f"data.sources: {folder.uri}: holds {found}; allowed are {', '.join((*IMAGE_SUFFIXES, *CONTAINER_SUFFIXES))}")
    folder.read((images or containers)[0]) if images else None
    for path in containers:
        if isinstance(folder.place, Path) and path.lower().endswith(".parquet"):
            try:
                names = pq.read_schema(folder.place / path).names
            except (ValueError, OSError) as error:
                raise UserError(f"data.sources: {folder.uri}/{path}: not a parquet file ({str(error).splitlines()[0]})") from error
            for wanted in (IMAGE_COLUMNS, CAPTION_COLUMNS):
                if column(names, wanted) is None:
                    found, allowed = ", ".join(names), " or ".join(wanted)
                    where = f"data.sources: {folder.uri}/{path}"
                    raise UserError(f"{where}: found columns {found}; allowed is one named {allowed} beside others")
    if images and not containers and not has_captions(folder):
        raise UserError(f"data.sources: {folder.uri}: holds {len(images)} pictures without a caption; allowed are {CAPTION_FORMS}")


def decode_picture(data: bytes, max_side_px: int) -> tuple[Image.Image, bytes | None]:
    """The RGB picture in `data`, upright, on white, its long side at most `max_side_px`; raises one of BROKEN.

    The second value is `data` itself where it holds that very picture and nothing else, such as the place it was taken at.
    """
    stored = Image.open(BytesIO(data))
    original = stored.format in ("JPEG", "PNG") and stored.mode == "RGB" and not stored.getexif() and max(stored.size) <= max_side_px
    stored.draft("RGB", (2 * max_side_px, 2 * max_side_px))  # a JPEG decodes faster at a fraction of its size
    stored.load()
    upright = ImageOps.exif_transpose(stored)
    picture = _rgb(upright)
    if max(picture.size) > max_side_px:
        scale = max_side_px / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return picture, data if original else None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "F"):  # 16 bits a grey pixel; Pillow would clip rather than scale them
        values = np.asarray(image, dtype=np.float64)
        return Image.fromarray((values / max(values.max(), 255.0) * 255.0).clip(0, 255).astype(np.uint8)).convert("RGB")
    return on_white(image)


def _walk(root: Path, uri: str) -> Iterator[tuple[str, tuple[int, str]]]:
    def refuse(error: OSError) -> None:
        raise UserError(f"data.sources: {uri}: cannot be read ({error.strerror}: {error.filename})") from error

    for parent, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not _hidden(name)]
        for name in names:
            path = Path(parent, name)
            if not _hidden(name) and path.is_file():
                known = path.stat()
                yield path.relative_to(root).as_posix(), (known.st_size, str(known.st_mtime_ns))


def _hidden(path: str) -> bool:
    parts: Sequence[str] = path.split("/")
    return any(part.startswith(".") for part in parts)
