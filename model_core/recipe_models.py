"""Sections of a recipe that describe the models: condition encoder, autoencoder with its training, transformer.

Sources in the comments are those of `model_core.recipe`, which is the whole.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from model_core.recipe_data import CompressionRatio, Count, LatentPixels, NonNegative, PositiveFloat, Section


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
    temporal_folds: list[bool] = Field([])  # local shortcut: levels that fold two frames, the first empty; S: [false, true, true, true]
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
    crop_px: LatentPixels = 64  # side of the training crop
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

    @model_validator(mode="after")
    def _axes_fill_head(self) -> MMDiTModel:
        if sum(self.rope_axes) != self.head_dim or any(axis % 2 for axis in self.rope_axes):
            raise ValueError(f"rope_axes {list(self.rope_axes)} must be even and sum to head_dim {self.head_dim}")
        return self

    @property
    def width(self) -> int:
        """Channels of the stream."""
        return self.num_heads * self.head_dim
