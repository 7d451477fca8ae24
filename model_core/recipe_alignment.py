"""Sections of a recipe that align the model with preferences: pairs, reward models, reinforcement learning.

Sources in the comments are those of `model_core.recipe`, which is the whole; "R4" is the Qwen-Image-2.0-RL report (arXiv 2606.27608).
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from model_core.recipe_data import Count, Guard, NonNegative, PositiveFloat, Section, Share

Dimension = Literal["aesthetics", "alignment", "portrait", "instruction_following", "visual_consistency"]  # R1: five reward models
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
EDIT_DIMENSIONS: tuple[Dimension, ...] = ("instruction_following", "visual_consistency")

NonNegativeFloat = Annotated[float, Field(ge=0.0)]


class Preferences(Section):
    """build_preferences: pairs of pictures, by dimension, and which one is better."""

    num_pairs: Count = 2000  # synthetic pairs a dimension, whose order is known (ours)
    tie_share: Share = 0.1  # of them between two that are equally good (ours)
    num_sampled: NonNegative = 16  # pairs drawn by the stages' models, for people to label (ours)
    guidance_scales: list[Annotated[float, Field(ge=1.0)]] = Field([1.0, 2.0], min_length=1)  # that sampled pairs are drawn with
    votes: list[str] = Field([])  # JSON Lines files of people's votes, as `darkroom label` writes them
    validation_share: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.1  # of prompts and source images: calibration is fitted on it
    test_share: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.1  # of prompts and source images: the report card


class RewardTrunk(Section):
    """The vision-language model under a reward model's heads (R4: Qwen-family)."""

    path: str | None = None  # folder with Qwen3-VL weights; None builds a tiny one of the sizes below, with random weights
    hidden_size: Count = 128
    num_layers: Count = 2
    num_heads: Count = 4
    vision_layers: Count = 1
    vision_hidden_size: Count = 64
    vocab_size: Annotated[int, Field(ge=300)] = 600
    image_px: Annotated[int, Field(ge=32, multiple_of=32)] = 64  # side of the square that pictures are scaled into

    @model_validator(mode="after")
    def _heads_divide(self) -> RewardTrunk:
        for name in ("hidden_size", "vision_hidden_size"):
            if (width := getattr(self, name)) % (4 * self.num_heads):
                raise ValueError(f"{name} {width} must be a multiple of 4 x num_heads, {4 * self.num_heads}")
        return self


class Reward(Section):
    """train_reward: one of five models on the same recipe."""

    trunk: RewardTrunk = RewardTrunk()
    steps: Count = 400
    batch_size: Count = 16  # pairs
    lr: PositiveFloat = 2e-3
    warmup_steps: NonNegative = 20
    decay_share: Share = 0.3  # of the steps, the last ones, over which the rate falls to 0 in a line (ours)
    weight_decay: NonNegativeFloat = 0.01
    grad_clip: PositiveFloat = 1.0
    pointwise_weight: NonNegativeFloat = 0.2  # expected score over 1..5, squared error (R4); 0: the pairwise loss alone
    pairwise_weight: NonNegativeFloat = 1.0  # Bradley-Terry with uncertainty and ties
    caption_weight: NonNegativeFloat = 3.0  # log-likelihood of the prompt under pictures that are as it says, where that is the question
    tie_ratio: Annotated[float, Field(gt=1.0)] = 5.0  # Rao and Kupper's k: P(tie | equal) = (k - 1) / (k + 1); HPSv3's and EditReward's
    # Losses of single pairs differ by orders of magnitude once most are told apart: only what is far above them is a spike (ours).
    guard: Guard = Guard(spike_deviations=30.0, spike_floor=10.0)
    log_every_steps: Count = 20
    checkpoint_every_steps: Count = 100

    @model_validator(mode="after")
    def _learns(self) -> Reward:
        if self.pointwise_weight == self.pairwise_weight == 0:
            raise ValueError("pointwise_weight and pairwise_weight are both 0; allowed is at least one above 0")
        return self
