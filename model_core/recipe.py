"""What to train: one typed, portable document, read from YAML.

A recipe says nothing about where it runs (that is the site, `model_core.site`) and is part of lineage: each step's key
is taken from the sections it reads. Sources in the comments: "R1" is the Qwen-Image-2.0 report (arXiv 2605.10730), "R2"
the VAE-2.0 report (2605.13565), "S" the public code of the successor, Qwen-Image-2.1; "ours" is a choice of this project.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from model_core.documents import UserError, canonical_digest, describe, override, read_document
from model_core.recipe_alignment import (
    DIMENSIONS,
    EDIT_DIMENSIONS,
    GRPO,
    SDE,
    Alarms,
    Dimension,
    GuidanceMode,
    Preferences,
    Reward,
    RewardPhase,
    RewardTrunk,
)
from model_core.recipe_data import (
    Captions,
    CaptionType,
    CompressionRatio,
    Count,
    Data,
    Edits,
    Guard,
    Kind,
    LatentPixels,
    NonNegative,
    PositiveFloat,
    Scenes,
    Section,
    Share,
    TextImages,
)
from model_core.recipe_distillation import DMD, Teacher
from model_core.recipe_enhancer import DEGRADATIONS, Degradation, Enhancer, EnhancerGRPO
from model_core.recipe_models import VAE, Encoder, MMDiTModel, VAEModel

__all__ = [
    "DEGRADATIONS",
    "DIMENSIONS",
    "DMD",
    "EDIT_DIMENSIONS",
    "GRPO",
    "SDE",
    "VAE",
    "Alarms",
    "CaptionType",
    "Captions",
    "CompressionRatio",
    "Data",
    "Degradation",
    "Dimension",
    "Edits",
    "Encoder",
    "Enhancer",
    "EnhancerGRPO",
    "Evaluation",
    "Guard",
    "GuidanceMode",
    "Kind",
    "MMDiT",
    "MMDiTModel",
    "Preferences",
    "Recipe",
    "Registry",
    "Reward",
    "RewardPhase",
    "RewardTrunk",
    "Sampling",
    "Scenes",
    "Stage",
    "Teacher",
    "TextImages",
    "Thresholds",
    "VAEModel",
    "load_recipe",
    "parse_recipe",
    "section",
]


class Thresholds(Section):
    """What filter_images keeps in a stage. None switches an operator off. Order of operators: R1 Fig. 6."""

    min_side_px: Count = 16
    dedup_distance: NonNegative | None = 0  # pHash bits two kept images must differ by more than
    min_entropy_bits: Annotated[float, Field(ge=0.0)] | None = None  # luma histogram, 0 to 8 bits
    max_entropy_bits: PositiveFloat | None = None
    min_sharpness: Annotated[float, Field(ge=0.0)] | None = None  # variance of the Laplacian of 0..255 luma
    max_nsfw: Share | None = None  # score of an installed detector
    max_caption_words: Count | None = None
    keep_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # keyed random subset, last of all: SFT is small


class Stage(Section):
    """One entry of the curriculum (R1 Table 2 and Fig. 6)."""

    resolution_px: LatentPixels = 256  # pixel budget is its square
    kinds: list[Kind] = Field(["image", "text_image", "edit"], min_length=1)
    filter: Thresholds = Thresholds()
    edit_share: Share = 0.1  # TI2I share of the samples: 0.1 (pre-training), 0.3 (after)
    text_image_share: Share = 0.05  # share of synthetic text images; Qwen-Image 1.0 used 5 %
    steps: Count = 1000
    batch_size: Count = 64
    lr: PositiveFloat = 1e-4  # 1e-4, 2e-5, 1e-5
    warmup_steps: NonNegative = 100  # ours
    cache_states: bool = False  # text states stored beside latents: 8 KiB a token of 4096 channels, which pays at 256 px only (ours)

    @model_validator(mode="after")
    def _shares_fit(self) -> Stage:
        edit = self.edit_share if "edit" in self.kinds else 0.0
        text = self.text_image_share if "text_image" in self.kinds else 0.0
        if edit + text > 1.0:
            raise ValueError(f"edit_share {edit} and text_image_share {text} together exceed 1")
        if "image" not in self.kinds and edit + text < 1.0:
            raise ValueError(f"kinds {self.kinds} leave the share {1.0 - edit - text:.3g} to images, which are not among them")
        return self


class MMDiT(Section):
    """train_mmdit: model, objective and the stages."""

    path: str | None = (
        None  # folder of earlier weights, this project's or diffusers', to start the first stage from; `model` must be theirs
    )
    model: MMDiTModel = MMDiTModel()
    logit_normal: tuple[float, PositiveFloat] = (0.0, 1.0)  # mean and std of logit(t); Qwen-Image 1.0
    shift_mu: tuple[float, float] | None = None  # t moved towards noise: exponential shift at 256 and 8192 tokens; None: no shift
    uncond_dropout: Share = 0.1  # R1 Table 2
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.001  # R1 Table 2
    betas: tuple[Share, Share] = (0.9, 0.95)  # ours
    grad_clip: PositiveFloat = 1.0  # R1 Table 2
    guard: Guard = Guard()
    # Of passes; weights, moments and sums stay fp32. bf16 needs a GPU, float8 one of compute capability 8.9: there the blocks' matrix
    # products are in FP8, and the rest is bf16.
    precision: Literal["fp32", "bf16", "float8"] = "fp32"
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9999  # ours
    caption_weights: dict[CaptionType, Annotated[float, Field(ge=0.0)]] = Field(
        {"general": 0.7, "text": 0.1, "knowledge": 0.1, "structured": 0.1}
    )  # how often a caption type is drawn (ours)
    window_row_groups: Count = 8  # row groups a kind that are open, and shuffled together, at a time (ours)
    micro_batch_tokens: Count | None = None  # most tokens that are packed into one pass of a process; None: its whole share
    log_every_steps: Count = 20
    checkpoint_every_steps: Count = 100
    keep_every_steps: Count | None = None  # checkpoints at its multiples are kept while the stage runs, beside the newest two
    stages: dict[str, Stage] = Field(min_length=1)

    @field_validator("stages")
    @classmethod
    def _stage_names(cls, stages: dict[str, Stage]) -> dict[str, Stage]:
        for name in stages:
            if not (name.isascii() and name.isalnum()):
                raise ValueError(f"found a stage named {name!r}; allowed are letters and digits, as in S1")
        return stages


class Sampling(Section):
    """How published weights are sampled (R1: 40 steps with guidance)."""

    steps: Count = 40
    guidance_scale: Annotated[float, Field(ge=1.0)] = 4.0  # Qwen-Image 1.0's default
    rescale_norm: bool = True  # norm-rescaled guidance, as Qwen-Image 1.0's pipeline
    shift_mu: tuple[float, float] = (0.5, 0.9)  # exponential shift at 256 and 8192 tokens; Qwen-Image 1.0
    final_sigma: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02  # Qwen-Image 1.0


class Evaluation(Section):
    """evaluate_model: how much is drawn and judged."""

    num_prompts: Count = 64  # held-out combinations of the plain scenes
    num_edits: Count = 48
    num_reconstructions: Count = 64
    grid_prompts: Count = 16  # of them shown in the report


class Registry(Section):
    """register_model: the name and alias of the registered model."""

    name: str = Field("darkroom", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    alias: str = Field("candidate", pattern=r"^[a-z][a-z0-9_-]*$")


class Recipe(Section):
    """One document: everything that decides what comes out, and nothing about where."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=40)
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0  # exact in every reader of JSON
    data: Data = Data()
    text_images: TextImages = TextImages()
    edits: Edits = Edits()
    captions: Captions = Captions()
    encoder: Encoder = Encoder()
    vae: VAE = VAE()
    mmdit: MMDiT
    sampling: Sampling = Sampling()
    preferences: Preferences = Preferences()
    reward: Reward = Reward()
    grpo: GRPO | None = None  # None: the last stage's model is not aligned, and no rewards are trained
    dmd: DMD | None = None  # None: no student of few steps is distilled
    enhancer: Enhancer | None = None  # None: no Prompt Enhancer is trained
    enhancer_grpo: EnhancerGRPO | None = None  # None: it is not aligned with rewards
    evaluation: Evaluation = Evaluation()
    registry: Registry = Registry()

    @model_validator(mode="after")
    def _enhancer_is_there(self) -> Recipe:
        if self.enhancer_grpo is not None and (self.enhancer is None or self.grpo is None):
            absent = "enhancer" if self.enhancer is None else "grpo, whose reward models score its pictures"
            raise ValueError(f"enhancer_grpo is set without {absent}; allowed is both or neither")
        return self

    @model_validator(mode="after")
    def _slots_are_whole(self) -> Recipe:
        for name, stage in self.mmdit.stages.items():
            if self.encoder.sees_images and stage.resolution_px % (2 * CompressionRatio):
                raise ValueError(
                    f"mmdit.stages.{name}.resolution_px is {stage.resolution_px}; an encoder that sees images needs multiples of 32"
                )
        return self

    @property
    def stages(self) -> list[str]:
        """Stage names in order."""
        return list(self.mmdit.stages)

    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON of the whole recipe."""
        return canonical_digest(self.model_dump(mode="json"))


def section(recipe: Recipe, path: str) -> Any:
    """The JSON value at a dotted path, such as `mmdit.stages.S6.filter`; a path that does not exist raises KeyError.

    Of a section that the recipe leaves out, all values are None.
    """
    value: Any = recipe.model_dump(mode="json")
    for part in path.split("."):
        value = value[part] if value is not None else None
    return value


def parse_recipe(document: dict[str, Any], where: str) -> Recipe:
    """A Recipe from a plain mapping; raises UserError that names `where` and the field."""
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise UserError(describe(error, where)) from error


def load_recipe(path: Path, assignments: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file, with `--set` assignments applied; raises UserError for any mistake."""
    document = override(read_document(path, "recipe"), assignments or [])
    return parse_recipe(document, f"recipe {path}")
