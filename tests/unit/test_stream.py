"""The packed stream: its order, and attention as planned against a brute force over the whole mask."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_core.models.attention import attend
from model_core.models.segments import Sample, num_tokens
from model_core.models.stream import pack
from model_core.recipe import MMDiTModel

TINY = MMDiTModel(num_layers=1, num_heads=2, head_dim=8, rope_axes=(2, 4, 2))
grids = st.tuples(st.integers(1, 5), st.integers(1, 5))
samples = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.one_of(st.integers(1, 4), grids), max_size=3), grids).map(lambda s: (s[0], *s[1], s[2])),
    min_size=1,
    max_size=5,
)


def config(attention: str) -> MMDiTModel:
    return MMDiTModel.model_validate(TINY.model_dump() | {"attention": attention})


def visible(packed: list[Sample], attention: str) -> Tensor:
    """(S, S): whether a query may look at a key, told token by token."""
    tokens = [
        (sample, segment, place, isinstance(packed[sample][segment], int))
        for sample in range(len(packed))
        for segment in range(len(packed[sample]))
        for place in range(num_tokens(packed[sample][segment]))
    ]

    def may_look(query: tuple[int, int, int, bool], key: tuple[int, int, int, bool]) -> bool:
        if query[0] != key[0]:
            return False
        same_picture = query[1] == key[1] and not query[3]
        return attention == "full" or same_picture or key[:3] <= query[:3]

    return torch.tensor([[may_look(query, key) for key in tokens] for query in tokens])


@settings(max_examples=40, deadline=None)
@given(samples, st.sampled_from(["full", "block_causal"]))
def test_planned_attention_is_the_softmax_over_all_that_may_be_seen(packed: list[Sample], attention: str) -> None:
    stream = pack(packed, config(attention))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(len(stream), 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(8)
    weights = scores.masked_fill(~visible(packed, attention), -math.inf).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weights, value)
    assert torch.allclose(attend(query, key, value, stream.plan), expected, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(samples, st.integers(1, 4))
def test_parts_of_a_stream_put_together_are_the_stream(packed: list[Sample], size: int) -> None:
    stream = pack(packed, TINY)
    parts = [stream.part(rank, size) for rank in range(size)]
    for name in ("order", "sample", "is_target", "positions"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(stream, name))


def test_text_and_pictures_come_in_the_order_of_the_segments() -> None:
    stream = pack([(2, (1, 2), 1, (2, 1)), (1, (1, 1))], TINY)
    # Text tokens are 0-3, picture tokens 4-8.
    assert stream.order.tolist() == [0, 1, 4, 5, 2, 6, 7, 3, 8]
    assert stream.sample.tolist() == [0] * 7 + [1] * 2
    assert stream.is_target.tolist() == [False] * 5 + [True] * 2 + [False, True]


def test_samples_of_one_shape_share_one_call_without_a_mask() -> None:
    plan = pack([(3, (2, 2))] * 4, TINY).plan
    assert [(call.queries.shape, call.mask) for call in plan.calls] == [((4, 7), None)]


def test_samples_of_very_different_sizes_do_not_pad_each_other() -> None:
    plan = pack([(10, (64, 64)), *[(10, (2, 2))] * 8], TINY).plan
    assert sorted(call.queries.shape for call in plan.calls) == [(1, 4106), (8, 14)]


@pytest.mark.parametrize("sample", [(), (5,), ((2, 2), 5)])
def test_a_sample_without_a_target_at_its_end_is_refused(sample: Sample) -> None:
    with pytest.raises(ValueError, match="the last must be the target"):
        pack([sample], TINY)
