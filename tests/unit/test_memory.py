"""Memory: what the formulas say autograd keeps is what it keeps, for each policy; and the peak of a step is as promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model_core.models.attention import attend
from model_core.models.mmdit import Block, MMDiT
from model_core.models.rope import rotary_table
from model_core.models.stream import pack
from model_core.recipe import MMDiTModel, VAEModel
from model_core.training.activation_checkpointing import checkpoint_activations
from model_core.training.memory import (
    activation_peak,
    block_activations,
    kept_activations,
    largest_micro_batch,
    outer_activations,
    state_memory,
)
from model_core.training.parameters import QWEN3_VL_8B, mmdit_parameters, vae_parameters
from model_core.training.throughput import Checkpointing

SMALL = MMDiTModel(num_layers=4, num_heads=4, head_dim=16, rope_axes=(4, 6, 6))
NUM_TOKENS = 512
TARGET = 496  # of them; the rest is text


class LiveStorages(TorchDispatchMode):
    """Bytes of all tensors made inside that are still alive, and the most there were: the measure that knows no policy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peak = 0
        self._old = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._old:
                    self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    @property
    def alive(self) -> int:
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        return sum(num for _, num in self._made.values())


def model_of(config: MMDiTModel, policy: Checkpointing) -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(config, latent_channels=8, text_dim=config.width)
    checkpoint_activations(model, policy)
    return model


def forward(model: MMDiT) -> Tensor:
    text = NUM_TOKENS - TARGET
    stream = pack([(text, (16, TARGET // 16))], model.config)
    return model(torch.randn(TARGET, 8), torch.randn(text, model.text_dim), torch.rand(1), stream)


def saved_bytes(config: MMDiTModel, dtype: torch.dtype) -> int:
    """Bytes of the distinct storages that autograd saves of one block, without its parameters and what all tokens share."""
    torch.manual_seed(0)
    block = Block(config).to(dtype)
    scale1, gate1, scale2, gate2 = (torch.randn(NUM_TOKENS, config.width, dtype=dtype, requires_grad=True) for _ in range(4))
    stream = torch.randn(NUM_TOKENS, config.width, dtype=dtype, requires_grad=True)
    plan = pack([((NUM_TOKENS // 16, 16),)], config).plan
    rotary = rotary_table(torch.zeros(NUM_TOKENS, 3, dtype=torch.long), axes=config.rope_axes, theta=config.rope_theta)
    shared = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), *rotary, scale1, gate1, scale2, gate2)}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(stream, (scale1, gate1, scale2, gate2), rotary, plan, attend)
    assert out.requires_grad
    return sum(num for key, num in saved.items() if key not in shared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms_of_a_block_are_what_autograd_saves(dtype: torch.dtype) -> None:
    predicted = sum(block_activations(SMALL, element_bytes=dtype.itemsize, fused_norm=False).values())
    assert saved_bytes(SMALL, dtype) / NUM_TOKENS == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_what_stays_alive_between_forward_and_backward_is_as_predicted(policy: Checkpointing) -> None:
    model = model_of(SMALL, policy)
    with LiveStorages(model) as live:
        out = forward(model)
        measured = live.alive
    assert out.requires_grad
    kept = kept_activations(SMALL, policy, element_bytes=4, fused_norm=False)
    assert measured / NUM_TOKENS == pytest.approx(SMALL.num_layers * kept + outer_activations(SMALL, element_bytes=4), rel=0.1)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_the_peak_of_forward_and_backward_is_as_predicted(policy: Checkpointing) -> None:
    model = model_of(SMALL, policy)
    with LiveStorages(model) as live:
        forward(model).sum().backward()
    assert live.peak / NUM_TOKENS == pytest.approx(activation_peak(SMALL, policy, element_bytes=4, fused_norm=False), rel=0.1)


def test_a_larger_micro_batch_than_the_largest_does_not_fit() -> None:
    config, memory = MMDiTModel(), 141 * 10**9
    state = state_memory(config, latent_channels=64, encoder=QWEN3_VL_8B, shards=64, memory_bytes=memory)
    for policy in ("none", "selective", "full"):
        largest = largest_micro_batch(config, policy, state=state, memory_bytes=memory)
        assert largest > 0
        assert state.total + largest * activation_peak(config, policy) <= memory
        assert state.total + (largest + 1) * activation_peak(config, policy) > memory


def test_less_is_kept_and_more_fits_the_more_is_computed_again() -> None:
    config, memory = MMDiTModel(), 141 * 10**9
    state = state_memory(config, latent_channels=64, encoder=QWEN3_VL_8B, shards=8, memory_bytes=memory)
    fits = [largest_micro_batch(config, policy, state=state, memory_bytes=memory) for policy in ("none", "selective", "full")]
    assert fits == sorted(set(fits))


def test_state_in_fp32_takes_20_bytes_a_parameter_over_all_shards() -> None:
    config = MMDiTModel()
    num = sum(mmdit_parameters(config, latent_channels=64, text_dim=4096).values())
    for shards in (1, 8, 1024):
        state = state_memory(config, latent_channels=64, encoder=QWEN3_VL_8B, shards=shards, memory_bytes=0)
        held = state.parameters + state.gradients + state.optimizer + state.ema
        assert shards * held == pytest.approx(20 * num, abs=20 * shards)


def test_what_does_not_fit_at_all_leaves_no_token() -> None:
    config, memory = MMDiTModel(), 80 * 10**9
    state = state_memory(config, latent_channels=64, encoder=QWEN3_VL_8B, shards=1, memory_bytes=memory)
    assert largest_micro_batch(config, "full", state=state, memory_bytes=memory) == 0


def test_the_vae_takes_room_only_where_it_is_on_the_gpu() -> None:
    config = MMDiTModel()
    away = state_memory(config, latent_channels=64, encoder=QWEN3_VL_8B, shards=8, memory_bytes=0)
    there = state_memory(config, latent_channels=64, encoder=QWEN3_VL_8B, shards=8, memory_bytes=0, vae=VAEModel())
    assert there.total - away.total == 2 * sum(vae_parameters(VAEModel()).values())
