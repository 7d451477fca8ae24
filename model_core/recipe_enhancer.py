"""Sections of a recipe that train the Prompt Enhancer: short requests to prompts that the generator can follow (R1 3.3).

Sources in the comments are those of `model_core.recipe`.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from model_core.recipe_data import Count, Guard, NonNegative, PositiveFloat, Section, Share

# R1 3.3: what a fine caption loses on its way to a short request.
Degradation = Literal["style", "colloquial", "lighting", "texture", "layout", "background", "subject"]
DEGRADATIONS: tuple[Degradation, ...] = get_args(Degradation)

CONSTRAINTS = "text_constraints"  # the reward of rules that answers keep; all others are of pictures

NonNegativeFloat = Annotated[float, Field(ge=0.0)]


class Enhancer(Section):
    """train_enhancer: supervised fine-tuning on degraded captions, the reversed operations as the chain of thought."""

    path: str | None = None  # folder with Qwen3.5 weights (R1: 9B); None builds a tiny one of the sizes below, with random weights
    hidden_size: Count = 128
    num_layers: Count = 3
    num_heads: Count = 4
    vocab_size: Annotated[int, Field(ge=300)] = 800
    degradations: dict[Degradation, Share] = Field(
        {"style": 0.5, "colloquial": 0.5, "lighting": 0.5, "texture": 0.5, "layout": 0.5, "background": 0.5, "subject": 0.3}
    )  # how often each one that applies is taken; rates set how hard and how open requests are (R1; the rates are ours)
    edit_share: Share = 0.3  # of the examples; one model serves both tasks (R1)
    steps: Count = 1000
    batch_size: Count = 64
    lr: PositiveFloat = 1e-5
    warmup_steps: NonNegative = 20
    decay_share: Share = 0.3  # of the steps, the last ones, over which the rate falls to 0 in a line (ours)
    weight_decay: NonNegativeFloat = 0.01
    betas: tuple[Share, Share] = (0.9, 0.98)
    grad_clip: PositiveFloat = 1.0
    # The loss falls to hundredths, where one odd example is many times the median.
    guard: Guard = Guard(spike_deviations=30.0, spike_floor=10.0)
    max_new_tokens: Count = 512  # of an answer, thoughts included
    num_checked: Count = 128  # held-out requests that are answered at the end
    log_every_steps: Count = 20
    checkpoint_every_steps: Count = 200


class EnhancerGRPO(Section):
    """align_enhancer: candidates are drawn by the frozen generator, and the pictures are rewarded (R1 3.3, which gives no numbers)."""

    updates: Count = 200
    group_size: Annotated[int, Field(ge=2)] = 8
    prompts_per_update: Count = 16
    weights: dict[str, NonNegativeFloat] = Field({"alignment": 1.0, "aesthetics": 1.0, "text_constraints": 1.0}, min_length=1)
    edit_weights: dict[str, NonNegativeFloat] = Field(
        {"instruction_following": 1.0, "visual_consistency": 1.0, "text_constraints": 1.0}, min_length=1
    )
    edit_share: Share = 0.3
    updates_per_rollout: Count = 1
    clip: PositiveFloat = 0.2  # half width of the ratio's range, a token
    kl_weight: NonNegativeFloat = 0.0  # of the KL to the supervised model
    std_floor: PositiveFloat = 1e-3
    lr: PositiveFloat = 1e-6
    warmup_updates: NonNegative = 0
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Share, Share] = (0.9, 0.99)
    grad_clip: PositiveFloat = 1.0
    num_fixed: Count = 64  # short prompts that are enhanced and drawn before and after, with fixed seeds
    log_every_updates: Count = 1
    checkpoint_every_updates: Count = 10

    @model_validator(mode="after")
    def _weighs(self) -> EnhancerGRPO:
        for name in ("weights", "edit_weights"):
            if not sum(getattr(self, name).values()) > 0:
                raise ValueError(f"{name}: found no weight above 0; allowed is at least one")
        return self

    @property
    def rewards(self) -> tuple[str, ...]:
        """Every reward that is weighted, by name."""
        return tuple(sorted({name for weights in (self.weights, self.edit_weights) for name, weight in weights.items() if weight}))
