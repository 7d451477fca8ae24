"""Sections of a recipe that say what data there are, and what all sections are made of. `model_core.recipe` is the whole."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

CompressionRatio = 16  # pixels a latent side; R1 section 3.1 (f16)

Kind = Literal["image", "text_image", "edit"]
CaptionType = Literal["general", "text", "knowledge", "structured"]

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


def _whole_latents(value: int) -> int:
    if value % CompressionRatio:
        raise ValueError(f"found {value}; allowed are multiples of {CompressionRatio}")
    return value


LatentPixels = Annotated[Count, AfterValidator(_whole_latents)]  # a side in pixels that holds whole latents


class Section(BaseModel):
    """A part of a recipe: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Guard(Section):
    """What a training loop does about losses that are not finite or that spike (ours); docs/reference/training.md tells it in full."""

    window: Annotated[int, Field(ge=4)] = 64  # good steps that a loss is compared with
    spike_deviations: PositiveFloat = 8.0  # robust standard deviations above the median that make a spike
    spike_floor: PositiveFloat = 0.5  # and at least this share of the median above it
    patience: Count = 4  # bad steps in a row before the weights go back to a checkpoint
    max_rollbacks: NonNegative = 2  # returns to a checkpoint before the training stops


class Scenes(Section):
    """Plain scenes that `synthetic://scenes` draws: one coloured shape at a place, and a letter with a digit (ours)."""

    num_images: Count = 8000
    size_px: Count = 64
    letters: str = Field("ABCDEFGHKLMNPRSTXYZ", min_length=1)  # the first character of the text
    digits: str = Field("0123456789", min_length=1)  # the second one
    text_share: Share = 0.85  # share of scenes that carry a text
    held_out_share: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.1  # of (colour, shape, position) and of texts: never drawn for training
    photo_background_share: Share = 0.0  # share of scenes drawn over a crop of the other sources' photographs: the harder ones


class Data(Section):
    """What ingest_images reads."""

    sources: list[str] = Field(["synthetic://scenes"], min_length=1)
    scenes: Scenes = Scenes()
    max_images: Count | None = None  # stop after so many; None takes all
    max_side_px: Annotated[int, Field(ge=16)] = 512  # longer pictures are stored reduced to it; the largest stage's side or more (ours)
    licence: str = "unknown"  # the licence tag of every row whose source names none

    @field_validator("sources")
    @classmethod
    def _known_scheme(cls, sources: list[str]) -> list[str]:
        for source in sources:
            scheme, _, rest = source.partition("://")
            if scheme not in ("synthetic", "file", "s3") or not rest:
                raise ValueError(f"found {source!r}; allowed are synthetic://scenes, file:///FOLDER and s3://BUCKET/PREFIX")
            if scheme == "synthetic" and rest != "scenes":
                raise ValueError(f"found {source!r}; the one synthetic source is synthetic://scenes")
        return sources


class TextImages(Section):
    """Synthetic text images (Qwen-Image 1.0 report, 3.4): pure paragraphs, text in a scene, filled templates."""

    num_images: NonNegative = 600
    size_px: Count = 64
    modes: dict[Literal["pure", "compositional", "template"], Annotated[float, Field(ge=0.0)]] = Field(
        {"pure": 1.0, "compositional": 1.0, "template": 1.0}
    )  # relative weights (ours)
    languages: list[Literal["en", "zh"]] = Field(["en", "zh"], min_length=1)
    font_px: tuple[Count, Count] = (10, 18)  # glyph height, least and most; R2 draws 5 to 20 px

    @model_validator(mode="after")
    def _can_be_drawn(self) -> TextImages:
        if self.num_images and not sum(self.modes.values()) > 0:
            raise ValueError("the weights of modes are all 0; allowed is at least one above 0, or num_images 0")
        if not self.font_px[0] <= self.font_px[1] <= self.size_px:
            raise ValueError(f"font_px {list(self.font_px)} must be a least and a most glyph height, up to size_px {self.size_px}")
        return self


class Edits(Section):
    """Edit pairs (R1 2.1: attribute, background, style, text, removal, restoration, multi-reference)."""

    num_pairs: NonNegative = 3000
    operations: list[Literal["attribute", "background", "style", "text", "removal", "restoration", "multi_reference"]] = Field(
        ["attribute", "background", "style", "text", "removal", "restoration", "multi_reference"], min_length=1
    )


class Captions(Section):
    """Four captions an image (R1 2.2)."""

    source: Literal["annotations"] = "annotations"  # where captions come from; a vision-language captioner joins here
    max_tokens: Count = 1024  # R1: instructions up to about 1K tokens
