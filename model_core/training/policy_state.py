"""A policy under training: weights, average, optimizer; and the policies that are done, where several are trained one after another."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from model_core.models.lora import add_lora, merged_state, without_lora
from model_core.models.mmdit import MMDiT
from model_core.recipe import GRPO
from model_core.training.ema import ema_of
from model_core.training.optim import Optimizer


class PolicyState:
    """Begins from `start`, which it takes over and freezes; one Stateful of a checkpoint."""

    def __init__(self, start: MMDiT, config: GRPO, *, seed: int) -> None:
        self._start, self._config, self._seed = start.requires_grad_(False).eval(), config, seed
        self._done: dict[str, dict[str, torch.Tensor]] = {}
        self.begin()

    @property
    def device(self) -> torch.device:
        """Where the policy is trained."""
        return next(self.model.parameters()).device

    def begin(self) -> None:
        """Starts another policy from the same weights."""
        config = self._config
        self.model = copy.deepcopy(self._start).requires_grad_(True)
        if config.lora_rank is not None:
            add_lora(self.model, rank=config.lora_rank, alpha=config.lora_alpha, seed=self._seed)
        self.ema = ema_of(self.model)
        self.optimizer = Optimizer(
            self.model,
            lr=config.lr,
            warmup_steps=config.warmup_updates,
            betas=config.betas,
            weight_decay=config.weight_decay,
            grad_clip=config.grad_clip,
        )

    def finish(self, name: str) -> None:
        """Keeps the policy's average under `name`."""
        self._done[name] = {key: value.detach().clone() for key, value in merged_state(self.ema).items()}

    def finished(self, name: str) -> MMDiT:
        """A policy that is done, frozen."""
        model = copy.deepcopy(self._start)
        model.load_state_dict(self._done[name])
        return model

    @contextmanager
    def reference(self) -> Iterator[MMDiT]:
        """The model before any update: the policy without its adapters, or else the start's weights."""
        if self._config.lora_rank is None:
            yield self._start
            return
        with without_lora(self.model):
            yield self.model

    def state_dict(self) -> dict[str, Any]:
        """All there is to go on from."""
        state = {"model": self.model.state_dict(), "ema": self.ema.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state | {"done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        for name, part in (("model", self.model), ("ema", self.ema), ("optimizer", self.optimizer)):
            part.load_state_dict(state[name])
        self._done = state["done"]
