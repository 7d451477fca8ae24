"""distill_dmd: a student of few steps by distribution-matching distillation (R1, R3; DMD2, arXiv 2405.14867).

Takes the model and, where it was aligned, the one before as `base`; the autoencoder, the encoder, and the data whose prompts are drawn.
Leaves the student's average weights and its sampler in `mmdit/`, `distillation.json` (every point of the curves, what was compared), and
pictures of the same prompts and seeds by the teacher, by the teacher in few steps, and by the student.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from model_core.context import StepContext
from model_core.data.contact_sheet import contact_sheet
from model_core.data.prompts import PolicyPrompt, prompts_of_update, read_prompts
from model_core.documents import UserError
from model_core.evaluation.before_after import fixed_prompts
from model_core.evaluation.drawing import Painter
from model_core.evaluation.few_step_comparison import Compared, brightness, compare_drawn, draw_compared, save_pictures
from model_core.evaluation.judge import Judge
from model_core.evaluation.report import DISTILLATION
from model_core.models.condition import load_encoder
from model_core.models.lora import merged_state
from model_core.models.mmdit import load_mmdit, save_mmdit
from model_core.models.vae import load_vae
from model_core.sampling.few_step import save_sampler
from model_core.training.distillation import DistillationChunk, Distiller, critic_backward, num_values, student_backward
from model_core.training.distillation_state import DistillationState
from model_core.training.distributed import compute_device, frozen_dtype, keep_deterministic
from model_core.training.guard import TrainingDiverged
from model_core.training.rollouts import latent_pictures
from model_core.training.updates import take_all

NUM_MEASURED = 8  # pictures whose brightness is logged


def run(context: StepContext) -> dict[str, Any]:
    """Distils to the end; returns what student and teacher reach. Raises TrainingDiverged when a loss or a gradient is not finite."""
    device = compute_device(context.ranks)
    keep_deterministic(device)
    distillation = _Distillation(context, device)
    config = distillation.config
    seconds = take_all(
        context,
        first=distillation.resume(),
        total=config.iterations,
        checkpoint_every=config.checkpoint_every_iterations,
        take=distillation.take,
        save=distillation.save,
        noun="iteration",
    )
    if not context.ranks.is_first:
        return {}
    return distillation.publish() | {"iterations": config.iterations, "train_seconds": round(seconds, 3)}


class _Distillation:
    """Student, fake score and teachers of a recipe, and the record of what they did."""

    def __init__(self, context: StepContext, device: torch.device) -> None:
        recipe, inputs = context.recipe, context.inputs
        if recipe.dmd is None:
            raise UserError(f"recipe {recipe.name}: found no dmd; allowed for distill_dmd is a recipe with that section")
        self.context, self.config, self.device = context, recipe.dmd, device
        aligned = load_mmdit(inputs["model"].folder("mmdit")).to(device).requires_grad_(False).eval()
        teachers = {"aligned": aligned, "base": aligned}
        if "base" in inputs:
            teachers["base"] = load_mmdit(inputs["base"].folder("mmdit")).to(device).requires_grad_(False).eval()
        self.distiller = Distiller(
            vae=load_vae(inputs["vae"].folder("vae")).to(device),
            encoder=load_encoder(inputs["encoder"].folder("encoder"), dtype=frozen_dtype(device)).to(device),
            teachers=teachers,
            sampling=recipe.sampling,
            config=self.config,
            seed=recipe.seed,
            ranks=context.ranks,
        )
        resolution_px = recipe.mmdit.stages[recipe.stages[-1]].resolution_px
        self.size_px = (resolution_px, resolution_px)
        self.prompts = read_prompts(
            inputs["images"],
            inputs["edits"],
            inputs["captions"],
            resolution_px=resolution_px,
            multiple_px=self.distiller.encoder.multiple_px,
            seed=recipe.seed,
        )
        self.state = DistillationState(aligned, self.config, seed=recipe.seed)
        self.points: list[dict[str, Any]] = []
        self.newest: dict[str, float] = {}  # of each number that is logged
        self.num_empty = 0

    def resume(self) -> int:
        """Takes up the newest checkpoint; returns how many iterations are done. The phase follows from that number."""
        found = self.context.checkpoints.restore({"distillation": self.state})
        if found is None:
            return 0
        self.points, self.newest, self.num_empty = found.notes["points"], found.notes["newest"], found.notes["num_empty"]
        return found.step

    def save(self, done: int) -> None:
        """A checkpoint after `done` iterations."""
        notes = {"points": self.points, "newest": self.newest, "num_empty": self.num_empty, "recipe": self.context.recipe.digest()}
        self.context.checkpoints.save(done, {"distillation": self.state}, notes=notes)

    def take(self, iteration: int) -> None:
        """One iteration: the fake score's update, and after every `ttur`-th one the student's."""
        config, distiller = self.config, self.distiller
        student_turn = (iteration + 1) % config.ttur == 0
        prompts = self._prompts_of(iteration)
        chunks = distiller.chunks(prompts, guided=student_turn and distiller.guided)
        num_elements = num_values(prompts, self.state.student.latent_channels)
        point = self._train_critic(iteration, chunks, num_elements)
        if student_turn:
            point |= self._train_student(iteration, chunks, num_elements)
        self._tell(iteration, point)

    def publish(self) -> dict[str, Any]:
        """Writes the student, its sampler, the record and the comparison; returns numbers of it."""
        output, recipe, distiller = self.context.output, self.context.recipe, self.distiller
        teacher = distiller.teachers["aligned"]
        student = copy.deepcopy(teacher)
        student.load_state_dict(merged_state(self.state.ema))
        save_mmdit(student, output / "mmdit")
        save_sampler(distiller.sampler, output / "mmdit")
        fixed = fixed_prompts(recipe, self.prompts, num=self.config.num_fixed, size_px=self.size_px)
        judge = Judge(recipe.data.scenes) if any(each.asked for each in fixed) else None
        steps, evaluations_a_step = self.config.student_steps, 2 if distiller.guided else 1
        few, as_dear = (recipe.sampling.model_copy(update={"steps": num}) for num in (steps, max(1, steps // evaluations_a_step)))
        drawn: dict[str, Compared] = {}
        for name, mmdit, sampling in (
            ("teacher", teacher, recipe.sampling),
            ("teacher_few", teacher, few),
            ("teacher_as_dear", teacher, as_dear),
            ("student", student, distiller.sampler),
        ):
            self.context.say(f"drawing {len(fixed)} fixed prompts: {name}, {sampling.steps} steps")
            painter = Painter(mmdit=mmdit, vae=distiller.vae, encoder=distiller.encoder, sampling=sampling)
            drawn[name] = draw_compared(painter, fixed, judge)
        comparison = compare_drawn(drawn, seed=recipe.seed)
        shown = save_pictures(output, fixed, drawn)
        document = {
            "points": self.points,
            "comparison": comparison,
            "sampler": {"steps": distiller.sampler.steps, "shift_mu": list(distiller.sampler.shift_mu)},
            "teacher": {"steps": recipe.sampling.steps, "evaluations_a_step": evaluations_a_step, "steps_as_dear": as_dear.steps},
            "shown": shown,
        }
        (output / DISTILLATION).write_text(json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n")
        sheet = output / "students.png"
        contact_sheet([[drawn[name].pictures[each["index"]] for name in drawn] for each in shown], columns=3).save(sheet)
        self.context.tracker.image("students", sheet, 0)
        numbers = {f"{name}/{score}": value for name, scores in comparison["judge"].items() for score, value in scores.items()}
        warnings = (
            [f"{self.num_empty} samples of the student were where the teacher had them, and gave no gradient"] if self.num_empty else []
        )
        return numbers | {"nfe": distiller.sampler.steps, "warnings": warnings}

    def _train_critic(self, iteration: int, chunks: Sequence[DistillationChunk], num_elements: int) -> dict[str, float]:
        state = self.state
        self._make_room(for_student=False)
        measured = critic_backward(self.distiller, state.student, state.critic, chunks, iteration=iteration, num_elements=num_elements)
        norm = state.critic_optimizer.clip().item()
        self._check(iteration, "fake score", measured.loss, norm)
        state.critic_optimizer.step(iteration)
        bins = {f"critic_error/t{number}": error for number, error in enumerate(measured.by_time) if math.isfinite(error)}
        return {"critic_loss": measured.loss, "critic_grad_norm": norm, **bins}

    def _train_student(self, iteration: int, chunks: Sequence[DistillationChunk], num_elements: int) -> dict[str, float]:
        state, number = self.state, iteration // self.config.ttur
        self._make_room(for_student=True)
        measured = student_backward(self.distiller, state.student, state.critic, chunks, iteration=iteration, num_elements=num_elements)
        norm = state.student_optimizer.clip().item()
        self._check(iteration, "student", measured.gradient_rms, norm)
        state.student_optimizer.step(number)
        state.after_student_step(number)
        self.num_empty += measured.num_empty
        point = {"matching_gradient": measured.gradient_rms, "student_grad_norm": norm}
        if len(measured.clean):
            shown = latent_pictures(self.distiller.vae, measured.clean[:NUM_MEASURED], measured.shape)
            point |= brightness(shown)
        return point

    def _make_room(self, *, for_student: bool) -> None:
        """On a GPU, what a phase does not need waits in the machine's memory: the other role's moments, and the teachers."""
        if not self.config.offload:
            return
        waiting = torch.device("cpu")
        for teacher in self.distiller.teachers.values():
            teacher.to(self.device if for_student else waiting)
        self.state.student_optimizer.move(self.device if for_student else waiting)
        self.state.critic_optimizer.move(waiting if for_student else self.device)

    def _check(self, iteration: int, role: str, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            found = f"found a loss of {loss} and a gradient norm of {norm}"
            advice = "a lower dmd.lr or dmd.critic_lr, or a larger ttur, may help"
            raise TrainingDiverged(f"iteration {iteration} of the {role}: {found}; {advice}")

    def _prompts_of(self, iteration: int) -> list[PolicyPrompt]:
        config = self.config
        return prompts_of_update(self.prompts, iteration, config.batch_size, edit_share=config.edit_share, seed=self.context.recipe.seed)

    def _tell(self, iteration: int, point: dict[str, float]) -> None:
        done = iteration + 1
        self.newest |= point
        if done % self.config.log_every_iterations == 0 or done == self.config.iterations:
            self.points.append({"iteration": done, **self.newest})
            self.context.log({f"dmd/{name}": value for name, value in self.newest.items()}, step=done)
        self.context.show(done, self.config.iterations, f"fake score's loss {point['critic_loss']:.4f}")
