"""Sections of a recipe that align the model with preferences: pairs, reward models, reinforcement learning.

Sources in the comments are those of `model_core.recipe`, which is the whole; "R4" is the Qwen-Image-2.0-RL report (arXiv 2606.27608).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

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
    dimension_steps: dict[Dimension, Count] = Field({})  # in place of `steps`, for dimensions that learn faster or slower
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

    def of(self, dimension: Dimension) -> Reward:
        """The settings of a dimension's model: those, with its own number of steps."""
        return self.model_copy(update={"steps": self.dimension_steps.get(dimension, self.steps)})


SDE = Literal["flow_sde", "dance_sde", "cps"]


class GuidanceMode(StrEnum):
    """What guidance a policy's objective sees, when pictures are drawn with it.

    `conditional` is the hybrid of R1 4.2: guided in the rollout, and without the unconditional branch in the objective.
    """

    FULL = "full"  # u + w (c - u), gradients through both branches
    DETACH = "detach_unconditional"  # the same value, u a constant
    CONDITIONAL = "conditional"  # c alone
    NONE = "none"  # no guidance in the rollout either


class RewardPhase(Section):
    """What is rewarded from an update on: weights by prompt category, `default` for those not named, and the mix of prompts."""

    from_update: NonNegative = 0
    weights: dict[str, dict[str, NonNegativeFloat]] = Field(
        {
            "default": {"alignment": 1.0, "aesthetics": 1.0},
            "portrait": {"alignment": 1.0, "aesthetics": 1.0, "portrait": 1.0},
            "edit": {"instruction_following": 1.0, "visual_consistency": 1.0},
        }
    )
    edit_share: Share = 0.3  # of the prompts; R1 4.2 adjusts weights and mix while training

    @field_validator("weights")
    @classmethod
    def _sums(cls, weights: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        if "default" not in weights:
            raise ValueError(f"found categories {', '.join(weights) or 'none'}; there must be a `default`")
        for category, rewards in weights.items():
            if not sum(rewards.values()) > 0:
                raise ValueError(f"found no weight above 0 for category {category!r}")
        return weights


class Alarms(Section):
    """When align_grpo stops: signs of over-optimisation and of broken rewards, means over `window` updates (ours)."""

    window: Annotated[int, Field(ge=2)] = 8
    min_agreement: Annotated[float, Field(ge=-1.0, le=1.0)] = -0.1  # correlation of gold and trained reward within groups
    max_gold_drop: PositiveFloat = 0.5  # of the gold reward, in its own deviations within a group, while the proxy rises
    max_high_frequency: Annotated[float, Field(gt=1.0)] = 3.0  # energy above half the Nyquist frequency, as a multiple of the beginning's
    max_saturation: Annotated[float, Field(gt=1.0)] = 2.0  # mean colour saturation, as a multiple of the beginning's
    min_diversity: Share = 0.3  # distance of a group's pictures from one another, as a share of the beginning's
    max_clip_asymmetry: Share = 0.5  # share held at the lower bound less that at the upper one, or the reverse
    max_invalid_share: Share = 0.5  # of one reward's scores
    max_flat_groups: Share = 0.9  # share of groups in which a reward gives all pictures one value


class GRPO(Section):
    """align_grpo. Values that neither report tells are those of alignment.md's recommended start, or ours."""

    updates: Count = 300
    guidance_mode: GuidanceMode = GuidanceMode.CONDITIONAL  # R1 4.2; scale and norm are those of `sampling`
    sde: SDE = "flow_sde"
    noise_level: PositiveFloat = 0.7  # a of Flow-SDE, eta of the others
    rollout_steps: Count = 10
    window_steps: Count = 2  # stochastic, trained steps of a rollout; the others are the ODE's (Flow-GRPO-Fast, MixGRPO)
    window_range: tuple[NonNegative, Count] = (0, 5)  # where a group's window may lie: high noise (R4)
    group_size: Annotated[int, Field(ge=2)] = 16
    prompts_per_update: Count = 32
    updates_per_rollout: Count = 1
    groups_a_chunk: Count = 4  # prompts that are rolled out at a time, while the chunk before is scored
    micro_batch: Count = 64  # transitions that go through the model at a time in an update
    ratio: Literal["guard", "ppo", "dppo"] = "guard"
    clip: PositiveFloat = 2e-6  # half width of the ratio's range; of dppo the KL from which a transition may not drift on
    kl_weight: NonNegativeFloat = 0.0  # of the KL to the model before
    lora_rank: Count | None = None  # None: all parameters are trained (R4)
    lora_alpha: PositiveFloat = 64.0
    lr: PositiveFloat = 1e-5
    warmup_updates: NonNegative = 0
    weight_decay: NonNegativeFloat = 1e-4
    betas: tuple[Share, Share] = (0.9, 0.999)
    grad_clip: PositiveFloat = 1.0
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    std_floor: PositiveFloat = 1e-3  # of a reward within a group: a smaller spread is treated as that
    gold: str | None = None  # a reward that is scored and watched, and never trained on
    schedule: list[RewardPhase] = Field([RewardPhase()], min_length=1)  # R1 4.2: weights and mix are adjusted while training
    alarms: Alarms = Alarms()
    policies: Literal["one", "two"] = "one"  # two: images and edits apart, then merged by distillation on the student's own states (R4)
    merge_updates: Count = 200  # of the merging; `prompts_per_update` samples each
    num_fixed: Count = 64  # prompts and edits that are drawn before and after, with fixed seeds
    log_every_updates: Count = 1
    checkpoint_every_updates: Count = 10
    min_range: NonNegativeFloat = 0.0  # greatest less least total in a group below which its prompt is left out (R4)

    @model_validator(mode="after")
    def _fits(self) -> GRPO:
        first, end = self.window_range
        if not first + self.window_steps <= end < self.rollout_steps:
            raise ValueError(
                f"window_range {list(self.window_range)} must hold window_steps {self.window_steps}, and end before the last of"
                f" {self.rollout_steps} rollout_steps"
            )
        begins = [phase.from_update for phase in self.schedule]
        if begins[0] != 0 or begins != sorted(set(begins)):
            raise ValueError(f"schedule begins at updates {begins}; allowed are rising ones from 0")
        if self.gold is not None and any(weights.get(self.gold) for phase in self.schedule for weights in phase.weights.values()):
            raise ValueError(f"gold {self.gold!r} is trained on by the schedule; allowed is a reward without a weight")
        if self.clip >= 1 and self.ratio != "dppo":
            raise ValueError(f"clip {self.clip} is no half width of a ratio's range; allowed are numbers below 1")
        return self

    @property
    def rewards(self) -> tuple[str, ...]:
        """Every reward that is weighted at some time, and the gold one, by name: sums do not depend on how a recipe is written."""
        trained = [name for phase in self.schedule for weights in phase.weights.values() for name, weight in weights.items() if weight]
        return tuple(sorted({*trained, *([self.gold] if self.gold else [])}))

    def phase(self, update: int) -> RewardPhase:
        """What is rewarded in an update."""
        return [phase for phase in self.schedule if phase.from_update <= update][-1]
