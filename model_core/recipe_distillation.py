"""Section of a recipe that distils the model into a student of few steps (distribution-matching distillation, DMD).

Sources in the comments are those of `model_core.recipe`; "R3" is the Qwen-Image-Flash report (arXiv 2606.03746), "DMD2" arXiv 2405.14867,
"SenseFlow" arXiv 2506.00523.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from model_core.recipe_data import Count, NonNegative, PositiveFloat, Section, Share

Teacher = Literal["base", "aligned"]  # the last stage's model, and the one that GRPO has made of it; without GRPO both are the former
Times = tuple[Annotated[float, Field(ge=0.0, le=1.0)], Annotated[float, Field(ge=0.0, le=1.0)]]


class DMD(Section):
    """distill_dmd. Teachers are guided as `sampling` says; the student never is: guidance is folded into it (R1)."""

    student_steps: Count = 4  # R1: 4 network evaluations
    iterations: Count = 2000  # R3; of the fake score, of which every `ttur`-th is followed by one of the student
    ttur: Count = 5  # updates of the fake score for one of the student (DMD2)
    ida: Share = 0.03  # of the student's weights that the fake score takes up after each of its updates (SenseFlow)
    batch_size: Count = 64
    edit_share: Share = 0.5  # R3: 5 to 5 is best
    # Which teachers' scores make up the real one, by student step: the base anchors the first ones, since a specialised teacher alone
    # lets the layout decay (R3, which does not publish its weights: these are ours).
    teacher_weights: list[dict[Teacher, Annotated[float, Field(ge=0.0)]]] = Field(
        [{"base": 1.0}, {"base": 0.5, "aligned": 0.5}, {"aligned": 1.0}, {"aligned": 1.0}]
    )
    match_times: Times = (0.02, 0.98)  # where student and teacher are compared, and the fake score is trained (DMD2), after the shift
    guidance_times: Times | None = None  # where guidance is taken, drawn apart (Decoupled-DMD); None: at the same times
    lr: PositiveFloat = 2e-6  # of the student (FastVideo)
    critic_lr: PositiveFloat = 8e-6  # of the fake score (FastVideo)
    warmup_iterations: NonNegative = 0
    betas: tuple[Share, Share] = (0.0, 0.999)  # DMD2
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01  # DMD2
    grad_clip: PositiveFloat = 10.0  # DMD2
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.98  # of the student's weights, which are published (FastVideo)
    lora_rank: Count | None = None  # student and fake score as adapters on one frozen teacher; None: all parameters are trained
    lora_alpha: PositiveFloat = 64.0
    offload: bool = False  # on a GPU, what a phase does not need waits in the machine's memory (ours)
    samples_a_chunk: Count = 32  # samples that go through the models at a time
    num_fixed: Count = 64  # prompts and edits that student and teacher draw at the end, with fixed seeds
    log_every_iterations: Count = 20
    checkpoint_every_iterations: Count = 100

    @model_validator(mode="after")
    def _fits(self) -> DMD:
        if len(self.teacher_weights) != self.student_steps:
            raise ValueError(
                f"teacher_weights has {len(self.teacher_weights)} entries; allowed is one a student step, {self.student_steps}"
            )
        for step, weights in enumerate(self.teacher_weights):
            if abs(sum(weights.values()) - 1.0) > 1e-6:
                raise ValueError(f"teacher_weights of step {step} sum to {sum(weights.values()):g}; allowed is 1")
        if self.offload and self.lora_rank is not None:
            raise ValueError("offload is true and lora_rank is set; allowed is one of them: adapters share the teacher's weights")
        for name, times in (("match_times", self.match_times), ("guidance_times", self.guidance_times)):
            if times is not None and not times[0] < times[1]:
                raise ValueError(f"{name} is {list(times)}; allowed are two rising times in 0..1")
        return self
