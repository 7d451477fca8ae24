"""What to train: one typed, portable document, read from YAML.

A recipe says nothing about where it runs (that is the site, `model_core.site`) and is part of lineage: each step's key
is taken from the sections it reads. Sources in the comments: "R1" is the Qwen-Image-2.0 report (arXiv 2605.10730), "R2"
the VAE-2.0 report (2605.13565), "S" the public code of the successor, Qwen-Image-2.1; "ours" is a choice of this project.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from model_core.documents import UserError, canonical_digest, describe, override, read_document

CompressionRatio = 16  # pixels a latent side; R1 section 3.1 (f16)

Kind = Literal["image", "text_image", "edit"]
CaptionType = Literal["general", "text", "knowledge", "structured"]

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """A part of a recipe: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


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


class Encoder(Section):
    """The frozen vision-language model that reads the prompt (R1 3.2: Qwen3-VL)."""

    # Folder with Qwen3-VL weights; None builds the tiny one below, with random weights. With a folder, its sizes are only planned with.
    path: str | None = None
    hidden_size: Count = 256
    num_layers: Count = 1
    num_heads: Count = 4
    vocab_size: Annotated[int, Field(ge=300)] = 1024
    system_prompt: str = "Comprehend and analyze the provided prompt."  # R1 Fig. 8
    # R1: the encoder reads condition images too. Off for the tiny one: a random vision tower knows nothing of them, and its image
    # tokens would only blur the instruction's states. Set it together with `path`.
    sees_images: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> Encoder:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(f"hidden_size {self.hidden_size} must be an even multiple of num_heads {self.num_heads}")
        return self


class VAEModel(Section):
    """f16c64 residual autoencoder (R1 3.1, R2). Defaults are the successor's published widths (S)."""

    latent_channels: Count = 64  # R1: c64
    stem_fold: Literal[1, 2, 4, 8, 16] = 1  # side of the block of pixels folded into channels first; 8 makes a CPU fast enough (ours)
    encoder_widths: list[Count] = Field([96, 192, 384, 768, 768], min_length=1)  # S
    decoder_widths: list[Count] = Field([1152, 1152, 576, 288, 144], min_length=1)  # S
    encoder_blocks: Count = 2  # residual blocks a level; S
    decoder_blocks: Count = 3  # S
    shortcut: Literal["none", "local", "global", "cosine"] = "global"  # R2 4.1: global is fastest; cosine: on a DCT basis (ours)
    mid_attention: bool = True  # S
    pixel_channels: Literal[3, 4] = 3  # RGB; S has 4, RGBA
    mixers: bool = True  # gated 1x1 convolutions beside each resampling, where S's idle temporal ones are (ours)
    post_quant_conv: bool = False  # 1x1 convolution on the latent before the decoder; S has it
    temporal_folds: list[bool] = []  # local shortcut: levels that fold two frames, the first empty; S: [false, true, true, true]
    norm_eps: PositiveFloat = 1e-6  # added to the mean square in each norm (ours); S divides by the bare norm: 1e-24

    @model_validator(mode="after")
    def _fields_agree(self) -> VAEModel:
        if self.temporal_folds and (self.shortcut != "local" or len(self.temporal_folds) != len(self.encoder_widths) - 1):
            raise ValueError(
                f"temporal_folds has {len(self.temporal_folds)} levels with a {self.shortcut} shortcut; it needs a local one and an entry"
                f" for each of {len(self.encoder_widths) - 1} resamplings"
            )
        if self.shortcut == "cosine" and self.pixel_channels != 3:
            raise ValueError("a cosine shortcut needs pixel_channels 3: its basis is made of colours without an alpha")
        return self

    @model_validator(mode="after")
    def _levels_make_f16(self) -> VAEModel:
        levels = int(math.log2(CompressionRatio // self.stem_fold)) + 1
        for side, widths in (("encoder_widths", self.encoder_widths), ("decoder_widths", self.decoder_widths)):
            if len(widths) != levels:
                raise ValueError(
                    f"{side} has {len(widths)} levels; a stem_fold of {self.stem_fold} needs {levels} to compress by {CompressionRatio}"
                )
        return self


class VAE(Section):
    """train_vae: model, losses and optimisation. No GAN, no KL (R1, R2)."""

    path: str | None = None  # folder of an earlier VAE, this project's or diffusers', to start from; `model` is not read then
    model: VAEModel = VAEModel()
    crop_px: Count = 64  # side of the training crop
    steps: NonNegative = 1200  # 0: the VAE at `path` as it is, with the latents' statistics that came with it
    batch_size: Count = 8
    lr: PositiveFloat = 2e-3  # ours
    warmup_steps: NonNegative = 50
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    grad_clip: PositiveFloat = 1.0
    l1_weight: Annotated[float, Field(ge=0.0)] = 1.0  # R2: pixel L1, weight 1
    mse_weight: Annotated[float, Field(ge=0.0)] = 0.0  # ours: leaves the median trap of L1 on flat pictures
    edge_weight: Annotated[float, Field(ge=0.0)] = 0.0  # ours: L1 of image gradients, stands in for LPIPS where no backbone is at hand
    lpips_weight: Annotated[float, Field(ge=0.0)] = 0.0  # R1 3.1 and R2 have a perceptual loss, R2 LPIPS; neither tells its weight
    lpips_path: str | None = None  # safetensors file of VGG16 and LPIPS's linear weights (docs/reference/vae.md); None: no LPIPS
    align_weight: Annotated[float, Field(ge=0.0)] = 0.1  # R2 4.2, weight from VA-VAE's code
    align_weight_relaxed: Annotated[float, Field(ge=0.0)] | None = None  # at the end, reached linearly (R1 3.1: relaxed); None: the same
    align_margins: tuple[float, float] = (0.0, 0.0)  # m_cos, m_dist at the start: strict
    align_margins_relaxed: tuple[float, float] = (0.5, 0.25)  # at the end: relaxed (VA-VAE's code)
    teacher_path: str | None = None  # folder of DINOv2 weights (R2: DINOv2-L); None: oriented edges, made by hand (ours)
    teacher_layer: Count | None = None  # of DINOv2, counted from 1; R2: one middle layer, undisclosed
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.99
    log_every_steps: Count = 20
    checkpoint_every_steps: Count = 100

    @field_validator("steps")
    @classmethod
    def _untrained_needs_a_path(cls, value: int, info: ValidationInfo) -> int:
        if value == 0 and info.data.get("path") is None:
            raise ValueError("found 0; allowed without a vae.path is 1 or more")
        return value

    @field_validator("crop_px")
    @classmethod
    def _crop_fits(cls, value: int) -> int:
        if value % CompressionRatio:
            raise ValueError(f"found {value}; allowed are multiples of {CompressionRatio}")
        return value

    @model_validator(mode="after")
    def _losses_have_their_networks(self) -> VAE:
        if (self.lpips_weight > 0) != (self.lpips_path is not None):
            raise ValueError(
                f"lpips_weight {self.lpips_weight} and lpips_path {self.lpips_path!r}: a weight above 0 needs a file, and a file one"
            )
        if (self.teacher_path is None) != (self.teacher_layer is None):
            raise ValueError(f"teacher_path {self.teacher_path!r} and teacher_layer {self.teacher_layer} go together: set both or none")
        if self.teacher_path is not None and not (self.align_weight or self.align_weight_relaxed):
            raise ValueError(f"teacher_path {self.teacher_path!r} teaches nothing with an align_weight of 0; allowed is one above 0")
        return self


class MMDiTModel(Section):
    """Single-stream MMDiT. Defaults are the successor's 7.1 B configuration (S); R1 gives the structure only."""

    num_layers: Count = 32  # S
    num_heads: Count = 32  # S
    head_dim: Count = 128  # S
    rope_axes: tuple[Count, Count, Count] = (16, 56, 56)  # frame, height, width; S and Qwen-Image 1.0
    rope_theta: PositiveFloat = 10_000.0  # S
    mlp_ratio: PositiveFloat = 3.0  # SwiGLU hidden width over model width; S
    rope_positions: Literal["ordinal", "running"] = "ordinal"  # frames and text count as in Qwen-Image 1.0, or along the stream (S)
    attention: Literal["full", "block_causal"] = "full"  # full is the safe reading of R1; block_causal is S
    condition_at_t0: bool = False  # text and condition images modulated at t=0; S
    place_input: bool = False  # image tokens also carry their rotary angles as input: short runs learn places sooner (ours)

    @model_validator(mode="after")
    def _axes_fill_head(self) -> MMDiTModel:
        if sum(self.rope_axes) != self.head_dim or any(axis % 2 for axis in self.rope_axes):
            raise ValueError(f"rope_axes {list(self.rope_axes)} must be even and sum to head_dim {self.head_dim}")
        return self

    @property
    def width(self) -> int:
        """Channels of the stream."""
        return self.num_heads * self.head_dim


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

    resolution_px: Count = 256  # pixel budget is its square
    kinds: list[Kind] = Field(["image", "text_image", "edit"], min_length=1)
    filter: Thresholds = Thresholds()
    edit_share: Share = 0.1  # TI2I share of the samples: 0.1 (pre-training), 0.3 (after)
    text_image_share: Share = 0.05  # share of synthetic text images; Qwen-Image 1.0 used 5 %
    steps: Count = 1000
    batch_size: Count = 64
    lr: PositiveFloat = 1e-4  # 1e-4, 2e-5, 1e-5
    warmup_steps: NonNegative = 100  # ours
    cache_states: bool = False  # text states stored beside latents: 8 KiB a token of 4096 channels, which pays at 256 px only (ours)

    @field_validator("resolution_px")
    @classmethod
    def _whole_latents(cls, value: int) -> int:
        if value % CompressionRatio:
            raise ValueError(f"found {value}; allowed are multiples of {CompressionRatio}")
        return value

    @model_validator(mode="after")
    def _shares_fit(self) -> Stage:
        edit = self.edit_share if "edit" in self.kinds else 0.0
        text = self.text_image_share if "text_image" in self.kinds else 0.0
        if edit + text > 1.0:
            raise ValueError(f"edit_share {edit} and text_image_share {text} together exceed 1")
        if "image" not in self.kinds and edit + text < 1.0:
            raise ValueError(f"kinds {self.kinds} leave the share {1.0 - edit - text:.3g} to images, which are not among them")
        return self


class Guard(Section):
    """What a training loop does about losses that are not finite or that spike (ours); docs/reference/training.md tells it in full."""

    window: Annotated[int, Field(ge=4)] = 64  # good steps that a loss is compared with
    spike_deviations: PositiveFloat = 8.0  # robust standard deviations above the median that make a spike
    spike_floor: PositiveFloat = 0.5  # and at least this share of the median above it
    patience: Count = 4  # bad steps in a row before the weights go back to a checkpoint
    max_rollbacks: NonNegative = 2  # returns to a checkpoint before the training stops


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
    evaluation: Evaluation = Evaluation()
    registry: Registry = Registry()

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
    """The JSON value at a dotted path, such as `mmdit.stages.S6.filter`; a path that does not exist raises KeyError."""
    value: Any = recipe.model_dump(mode="json")
    for part in path.split("."):
        value = value[part]
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
