"""AdamW with warm-up and clipping, as one object a training loop calls once a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from model_core.training.distributed import whole


def warmup_lr(step: int, *, lr: float, warmup_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up to `lr`, then constant (R1 gives one number a stage)."""
    return lr * min(1.0, (step + 1) / (warmup_steps + 1))


def decay_share(step: int, *, over: range) -> float:
    """What of the learning rate optimizer step `step` takes where it falls to 0 in a line over the steps `over`: 1 before them."""
    return min(1.0, (over.stop - step) / (len(over) + 1)) if len(over) else 1.0


def decay_groups(parameters: Iterable[nn.Parameter], *, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices and filters decay, vectors (norm scales, biases) do not. None is empty."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Optimizer:
    """AdamW (decoupled decay) with linear warm-up and clipping of the global gradient norm; parameters may be sharded.

    Over the steps `decay_over` the rate falls to 0 in a line; none: it does not.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        warmup_steps: int,
        betas: tuple[float, float],
        weight_decay: float,
        grad_clip: float,
        decay_over: range = range(0),
    ) -> None:
        self._model = model
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._adamw = torch.optim.AdamW(decay_groups(self._parameters, weight_decay=weight_decay), lr=lr, betas=betas, fused=True)
        self._lr, self._warmup_steps, self._grad_clip, self._decay_over = lr, warmup_steps, grad_clip, decay_over

    def clip(self) -> Tensor:
        """Clips the gradients to the global norm; returns the norm before."""
        norm: Tensor = whole(nn.utils.clip_grad_norm_(self._parameters, self._grad_clip, foreach=True))
        return norm

    def step(self, step: int) -> None:
        """Takes optimizer step `step` with the gradients at hand, and clears them."""
        lr = warmup_lr(step, lr=self._lr, warmup_steps=self._warmup_steps) * decay_share(step, over=self._decay_over)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self.clear()

    def clear(self) -> None:
        """Forgets the gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def move(self, device: torch.device) -> None:
        """Takes the moments to `device`: while others need the room, they may wait elsewhere. A step needs them back."""
        for moments in self._adamw.state.values():
            for name, value in moments.items():
                moments[name] = value.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Moments of every parameter, by the parameter's name in the model: they can be taken up at any world size."""
        return get_optimizer_state_dict(self._model, self._adamw)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the moments that `state_dict` gave. A parameter that has never had a gradient has none, and may stay so."""
        set_optimizer_state_dict(self._model, self._adamw, state, options=StateDictOptions(strict=False))
