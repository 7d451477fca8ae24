"""Low-rank adapters on a transformer's blocks (LoRA, Hu et al. 2021): W x + (alpha / r) B A x, with W frozen and B zero at first."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_core.models.mmdit import MMDiT


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapter; `down` (r, in) is A, `up` (out, r) is B."""

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        down = torch.empty(rank, linear.in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.down = nn.Parameter(down.to(linear.weight))
        self.up = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        self.scale, self.active = alpha / rank, True

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        base = F.linear(x, self.weight)
        return base + self.scale * F.linear(F.linear(x, self.down), self.up) if self.active else base

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + (alpha / r) B A, (out, in)."""
        return self.weight + self.scale * (self.up @ self.down)


def add_lora(model: MMDiT, *, rank: int, alpha: float, seed: int) -> None:
    """Puts an adapter on every linear layer of the blocks, keyed by `seed`, and freezes all else."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for block in model.blocks:
        for name, linear in list(block.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(block, name, LoRALinear(linear, rank=rank, alpha=alpha, generator=generator))


def sharing_copy(model: MMDiT) -> MMDiT:
    """A copy whose frozen weights are the model's own: several roles, each with its adapters, then need them once."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad})


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Within it the model is the one that the adapters were put on."""
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for adapter in adapters:
        adapter.active = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.active = True


def merged_state(model: MMDiT) -> dict[str, Tensor]:
    """The weights of a model without adapters that computes the same: what is published. Without adapters, the model's own."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            state[f"{name}.weight"] = module.merged()
            del state[f"{name}.down"], state[f"{name}.up"]
    return state
