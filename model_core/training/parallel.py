"""How a model is laid out over the ranks of its step: put on from outside, in the order FP8, recompute, compile, shard.

But for FP8, which the recipe asks for, none of this changes what is computed other than the order in which sums are rounded; it
belongs to the site, not to the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from model_core.documents import UserError
from model_core.models.attention import attend
from model_core.models.mmdit import Attend, MMDiT
from model_core.models.stream import Stream
from model_core.recipe import MMDiTModel
from model_core.site import LaunchProfile
from model_core.training.activation_checkpointing import checkpoint_activations
from model_core.training.distributed import ALONE, Ranks
from model_core.training.float8 import use_float8


@dataclass(frozen=True)
class Layout:
    """`ranks` of the step are a grid: `data` ranks have batches of their own, `context` ranks share each stream's tokens."""

    ranks: Ranks = ALONE
    data: Ranks = ALONE
    context: Ranks = ALONE

    @property
    def attend(self) -> Attend:
        """Attention over a stream that lies on the context ranks."""
        if self.context.size == 1:
            return attend
        from model_core.training.context_parallel import ulysses

        return ulysses(self.context)

    def part(self, stream: Stream) -> tuple[Stream, slice]:
        """This rank's tokens of a stream, and which of its targets are among them."""
        if self.context.size == 1:
            return stream, slice(None)
        first = self.context.rank * len(stream) // self.context.size
        part = stream.part(self.context.rank, self.context.size)
        start = int(stream.is_target[:first].sum())
        return part, slice(start, start + int(part.is_target.sum()))


def lay_out(ranks: Ranks, *, context_parallel: int) -> Layout:
    """The grid of ranks; neighbours share a stream, since they talk most. All ranks must call it."""
    if ranks.size == 1 or context_parallel == 1:
        return Layout(ranks, ranks, ALONE)
    from torch.distributed.device_mesh import init_device_mesh

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (ranks.size // context_parallel, context_parallel), mesh_dim_names=("data", "context"))
    return Layout(ranks, *(Ranks(mesh.get_local_rank(name), mesh[name].size(), group=mesh.get_group(name)) for name in ("data", "context")))


def check_layout(config: MMDiTModel, profile: LaunchProfile, ranks: Ranks) -> None:
    """Raises UserError where the ranks or the model's heads cannot be dealt out to groups of `context_parallel`."""
    for what, number in (("ranks that were started", ranks.size), ("heads of the model", config.num_heads)):
        if number % profile.context_parallel:
            raise UserError(
                f"launch.steps.train_mmdit.context_parallel: found {profile.context_parallel}; allowed are divisors of the {number} {what}"
            )


def compile_blocks(model: MMDiT, **options: Any) -> None:
    """Compiles what a block does before and after attention, for any number of tokens; all blocks share the code."""
    for block in model.blocks:
        for name in ("project", "merge"):
            setattr(block, name, torch.compile(getattr(block, name), fullgraph=True, dynamic=True, **options))


def prepare(model: MMDiT, profile: LaunchProfile, ranks: Ranks, *, dtype: torch.dtype = torch.float32, float8: bool = False) -> None:
    """Recompute, compile and shard as the profile says; parameters stay fp32, `dtype` is that of the passes where they are sharded."""
    if float8:
        use_float8(model)
    checkpoint_activations(model, profile.activation_checkpointing)
    if profile.compile:
        compile_blocks(model)
    shard(model, profile, ranks, dtype=dtype)


def shard(model: MMDiT, profile: LaunchProfile, ranks: Ranks, *, dtype: torch.dtype = torch.float32) -> None:
    """FSDP2 over all ranks, or HSDP: sharded within a machine, repeated on each. Gradients are summed in fp32, not averaged."""
    if profile.shard == "none" or ranks.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if profile.shard == "hsdp":
        mesh = init_device_mesh(device, (ranks.size // ranks.local_size, ranks.local_size), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device, (ranks.size,), mesh_dim_names=("shard",))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*model.blocks, model):
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
        # The loss is already divided by the global number of elements; gloo knows plain sums alone.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
