"""Context parallelism: one packed stream over several ranks, each with its part of the tokens (DeepSpeed-Ulysses, arXiv 2309.14509).

All but attention works token by token. For attention, ranks exchange tokens for heads: each gets the whole stream for its share
of the heads, attends as a single rank would, and gives the results back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model_core.models.attention import AttentionPlan, attend
from model_core.models.mmdit import Attend
from model_core.training.distributed import Ranks


def ulysses(ranks: Ranks) -> Attend:
    """Attention for streams whose tokens lie on `ranks` as `Stream.part` deals them out; heads must be a multiple of the ranks."""

    def attend_together(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        num_tokens, size = len(plan.results), ranks.size
        lengths = [(rank + 1) * num_tokens // size - rank * num_tokens // size for rank in range(size)]
        own = lengths[ranks.rank]
        # (S / P, 3, H, d), heads split by rank: to each rank its heads of my tokens, from each its tokens of my heads.
        mine = torch.stack((query, key, value), dim=1).unflatten(2, (size, -1)).movedim(2, 0).flatten(0, 1)
        whole = _Exchange.apply(mine, [own] * size, lengths, ranks.group)
        query, key, value = whole.unbind(1)
        attended = attend(query, key, value, plan)
        back = _Exchange.apply(attended, lengths, [own] * size, ranks.group)
        return back.unflatten(0, (size, own)).movedim(0, 1).flatten(1, 2)

    return attend_together


class _Exchange(torch.autograd.Function):
    """Rows to and from each rank of a group; gradients travel the other way."""

    @staticmethod
    def forward(context: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        """`sent` and `received` rows for each rank in order: (sum(sent), ...) to (sum(received), ...)."""
        context.sizes, context.group = (sent, received), group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """The same with the sizes swapped."""
        sent, received = context.sizes
        return _exchange(gradient, received, sent, context.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    result = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result
