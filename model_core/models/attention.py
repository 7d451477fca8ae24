"""Attention over a packed stream: who looks at whom, as few dense calls of scaled-dot-product attention.

A boolean mask would turn the fast kernels off, so looks of like size share a call and only padding and text are masked. On
CUDA, full attention over whole samples is one call of the variable-length kernel. Legend: S tokens, H heads, d channels a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 0.25  # of a call's pairs of query and key that may be padding
SMALL_CALL = 65_536  # pairs: below, one call more costs more than padding


@dataclass(frozen=True)
class Look:
    """Queries (q,) that look at keys (k,), as places; `causal`: the last q keys are the queries, which see none after themselves."""

    queries: np.ndarray
    keys: np.ndarray
    causal: bool = False


@dataclass(frozen=True)
class AttentionCall:
    """A dense call: `queries` (b, q) and `keys` (b, k), padded; `mask` (b, 1, 1 or q, k), true where a key may be seen."""

    queries: Tensor
    keys: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """The calls, and for each query where its result lies among those of the calls, one after another: `results` (S,).

    `in_order`: there is one call, of all tokens as they stand, so that nothing need be gathered. `offsets` (B + 1,) int32 and
    `longest`: ends of samples of full attention, for the variable-length kernel; else None.
    """

    calls: tuple[AttentionCall, ...]
    results: Tensor
    in_order: bool = False
    offsets: Tensor | None = None
    longest: int = 0

    def to(self, device: torch.device) -> AttentionPlan:
        """The same on another device."""
        calls = tuple(
            AttentionCall(call.queries.to(device), call.keys.to(device), None if call.mask is None else call.mask.to(device))
            for call in self.calls
        )
        offsets = None if self.offsets is None else self.offsets.to(device)
        return AttentionPlan(calls, self.results.to(device), self.in_order, offsets, self.longest)


def plan_attention(looks: Sequence[Look], *, lengths: Sequence[int] | None = None) -> AttentionPlan:
    """The plan of looks that together have each query once. `lengths`: of samples, one after another, that see all of themselves."""
    groups: list[list[Look]] = []
    pairs = 0
    for look in sorted((look for look in looks if len(look.queries)), key=lambda look: (look.causal, len(look.keys), len(look.queries))):
        own = len(look.queries) * len(look.keys)
        if groups and groups[-1][0].causal == look.causal:
            group = [*groups[-1], look]
            padded = len(group) * max(len(member.queries) for member in group) * max(len(member.keys) for member in group)
            if padded - pairs - own <= max(PADDING * padded, SMALL_CALL):
                groups[-1].append(look)
                pairs += own
                continue
        groups.append([look])
        pairs = own
    # An empty query, as of a sample without text, has no call: the plan may have fewer calls than looks.
    results = np.zeros(sum(len(look.queries) for look in looks), dtype=np.int64)
    done = 0
    for group in groups:
        longest = max(len(look.queries) for look in group)
        for row, look in enumerate(group):
            results[look.queries] = done + row * longest + np.arange(len(look.queries))
        done += len(group) * longest
    offsets = None if lengths is None else torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
    calls = tuple(map(_call, groups))
    everything = torch.arange(len(results))
    in_order = len(calls) == 1 and all(torch.equal(places.flatten(), everything) for places in (calls[0].queries, calls[0].keys))
    return AttentionPlan(calls, torch.from_numpy(results), in_order, offsets, max(lengths or [0]))


def _call(group: Sequence[Look]) -> AttentionCall:
    num_queries, num_keys = (max(len(getattr(look, name)) for look in group) for name in ("queries", "keys"))
    queries, keys = np.zeros((len(group), num_queries), dtype=np.int64), np.zeros((len(group), num_keys), dtype=np.int64)
    for row, look in enumerate(group):
        queries[row, : len(look.queries)], keys[row, : len(look.keys)] = look.queries, look.keys
    lengths = np.array([len(look.keys) for look in group])
    place = np.arange(num_keys)
    if group[0].causal:
        before = lengths - [len(look.queries) for look in group]
        mask = place <= np.minimum(before[:, None] + np.arange(num_queries), lengths[:, None] - 1)[:, :, None]
    elif (lengths < num_keys).any():
        mask = (place < lengths[:, None])[:, None]
    else:
        return AttentionCall(torch.from_numpy(queries), torch.from_numpy(keys), None)
    return AttentionCall(torch.from_numpy(queries), torch.from_numpy(keys), torch.from_numpy(mask)[:, None])


def attend(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
    """softmax(q k' / sqrt(d)) v of query (S, H, d) over key and value (K, H, d) as planned: (S, H, d)."""
    if query.is_cuda and plan.offsets is not None and query.dtype != torch.float32:
        return _variable_length(query, key, value, plan.offsets, plan.longest)
    results = []
    for call in plan.calls:
        attended = F.scaled_dot_product_attention(
            _rows(query, call.queries, plan.in_order),
            _rows(key, call.keys, plan.in_order),
            _rows(value, call.keys, plan.in_order),
            attn_mask=call.mask,
        )
        results.append(attended.transpose(1, 2).flatten(0, 1))
    return results[0] if plan.in_order else torch.cat(results).index_select(0, plan.results)


def _rows(tokens: Tensor, places: Tensor, in_order: bool) -> Tensor:
    """(S, H, d) tokens at places (b, q): (b, H, q, d)."""
    chosen = tokens if in_order else tokens.index_select(0, places.flatten())
    return chosen.unflatten(0, places.shape).transpose(1, 2)


def _variable_length(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(query, key, value, offsets, offsets, longest, longest)
    assert isinstance(attended, Tensor)
    return attended
