"""Student and fake score under training: weights, the student's average, optimizers; one Stateful of a checkpoint."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from model_core.models.lora import add_lora, sharing_copy
from model_core.models.mmdit import MMDiT
from model_core.recipe import DMD
from model_core.training.ema import update_ema
from model_core.training.optim import Optimizer


class DistillationState:
    """Both begin as `start`, which stays as it is. As adapters they share its weights, so that three roles need one copy of them."""

    def __init__(self, start: MMDiT, config: DMD, *, seed: int) -> None:
        self._config = config
        self.student, self.critic = (_role(start, config, seed=seed) for _ in range(2))
        self.ema = sharing_copy(self.student).requires_grad_(False).eval()
        self.student_optimizer = _optimizer(self.student, config, lr=config.lr)
        self.critic_optimizer = _optimizer(self.critic, config, lr=config.critic_lr)

    def after_student_step(self, number: int) -> None:
        """Keeps the student's average after its step `number` (from 0), and lets the fake score take up a part of the student."""
        update_ema(self.ema, self.student, step=number, decay=self._config.ema_decay)
        take_up(self.critic, self.student, share=self._config.ida)

    def state_dict(self) -> dict[str, Any]:
        """All there is to go on from; of adapters, not the weights under them."""
        return {
            "student": _trained(self.student),
            "critic": _trained(self.critic),
            "ema": _trained(self.ema, like=self.student),
            "student_optimizer": self.student_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        whole = self._config.lora_rank is None
        for name, model in (("student", self.student), ("critic", self.critic), ("ema", self.ema)):
            model.load_state_dict(state[name], strict=whole)
        self.student_optimizer.load_state_dict(state["student_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])


@torch.no_grad()
def take_up(critic: MMDiT, student: MMDiT, *, share: float) -> None:
    """Implicit distribution alignment: phi <- (1 - share) phi + share theta (SenseFlow, arXiv 2506.00523).

    The fake score follows each of the student's steps at once, and learns only what is left. Of adapters, A and B are each taken up.
    """
    pairs = zip(critic.parameters(), student.parameters(), strict=True)
    trained = [(mine, theirs) for mine, theirs in pairs if mine.requires_grad]
    torch._foreach_lerp_([mine for mine, _ in trained], [theirs for _, theirs in trained], share)


def _role(start: MMDiT, config: DMD, *, seed: int) -> MMDiT:
    if config.lora_rank is None:
        return copy.deepcopy(start).requires_grad_(True)
    role = sharing_copy(start.requires_grad_(False))
    add_lora(role, rank=config.lora_rank, alpha=config.lora_alpha, seed=seed)
    return role


def _optimizer(model: MMDiT, config: DMD, *, lr: float) -> Optimizer:
    return Optimizer(
        model,
        lr=lr,
        warmup_steps=config.warmup_iterations,
        betas=config.betas,
        weight_decay=config.weight_decay,
        grad_clip=config.grad_clip,
    )


def _trained(model: MMDiT, like: MMDiT | None = None) -> dict[str, Tensor]:
    """The weights that are trained (in `like`, where the model is an average), by name."""
    names = {name for name, parameter in (like or model).named_parameters() if parameter.requires_grad}
    return {name: parameter for name, parameter in model.state_dict().items() if name in names}
