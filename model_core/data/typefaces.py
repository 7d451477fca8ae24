"""Typefaces that come with installed packages: DejaVu with matplotlib (Latin), Noto and SimHei with mplfonts (Chinese)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

from model_core.documents import UserError
from model_core.recipe import TextImages

MEASURED_SIZE = 1000  # em, in pixels, at which a typeface's proportions are measured


@dataclass(frozen=True)
class Typeface:
    """A font file of a package, and the sign whose height is called the height of its glyphs."""

    package: str
    file: str
    measured_by: str

    @property
    def path(self) -> Path:
        """The file, wherever the package is installed."""
        return Path(str(files(self.package) / self.file))


TYPEFACES: dict[str, tuple[Typeface, ...]] = {
    "en": tuple(
        Typeface("matplotlib", f"mpl-data/fonts/ttf/{name}.ttf", "H")
        for name in ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold")
    ),
    "zh": tuple(
        Typeface("mplfonts", f"fonts/{name}", "国") for name in ("NotoSansCJKsc-Regular.otf", "NotoSerifCJKsc-Regular.otf", "SimHei.ttf")
    ),
}


def check_typefaces(config: TextImages) -> None:
    """Raises UserError when a package that a language's typefaces come with or are read with is not installed."""
    for language in config.languages if config.num_images else ():
        for package in (TYPEFACES[language][0].package, "fontTools"):
            if find_spec(package) is None:
                raise UserError(
                    f"text_images.languages: found {language}, which needs the package {package}, which is not installed; "
                    "install darkroom[demo], or leave the language out"
                )


@lru_cache(maxsize=256)
def font(face: Typeface, glyph_px: int) -> ImageFont.FreeTypeFont:
    """The typeface at the size where `measured_by` is `glyph_px` high."""
    top, bottom = _extent(face)
    return ImageFont.truetype(str(face.path), round(glyph_px * MEASURED_SIZE / (bottom - top)))


def ascent(face: Typeface) -> float:
    """How far above the baseline `measured_by` reaches, as a share of its height."""
    top, bottom = _extent(face)
    return -top / (bottom - top)


def covers(face: Typeface, text: str) -> bool:
    """Whether the typeface has a glyph for every sign of `text`."""
    return all(sign.isspace() or ord(sign) in _signs(face) for sign in text)


@lru_cache(maxsize=16)
def _extent(face: Typeface) -> tuple[float, float]:
    """(top, bottom) of `measured_by` against the baseline, downwards, at MEASURED_SIZE."""
    _, top, _, bottom = ImageFont.truetype(str(face.path), MEASURED_SIZE).getbbox(face.measured_by, anchor="ls")
    return top, bottom


@lru_cache(maxsize=16)
def _signs(face: Typeface) -> frozenset[int]:
    from fontTools.ttLib import TTFont

    return frozenset(TTFont(face.path, lazy=True).getBestCmap())
