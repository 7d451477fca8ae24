"""Activation statistics against what the tensors themselves say."""

from __future__ import annotations

import pytest
import torch

from model_core.models.mmdit import MMDiT
from model_core.models.stream import pack
from model_core.recipe import MMDiTModel
from model_core.training.activation_statistics import activation_statistics

CONFIG = MMDiTModel(num_layers=2, num_heads=2, head_dim=8, rope_axes=(2, 4, 2))


def test_the_largest_activations_and_the_share_of_shut_gates_are_told() -> None:
    torch.manual_seed(0)
    model = MMDiT(CONFIG, latent_channels=4, text_dim=6)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp_in.weight.mul_(6.0)
    stream = pack([(3, (2, 2)), (2, (1, 3))], CONFIG)
    inputs = (torch.randn(7, 4), torch.randn(5, 6), torch.rand(2), stream)
    seen: list[torch.Tensor] = []
    gates: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda *arguments: seen.append(arguments[2])) for block in model.blocks]
    handles += [block.mlp_in.register_forward_hook(lambda *arguments: gates.append(arguments[2][:, :48])) for block in model.blocks]
    model(*inputs)
    for handle in handles:
        handle.remove()

    with activation_statistics(model) as statistics:
        model(*inputs)
    assert statistics["stream_max"].item() == max(output.abs().max().item() for output in seen)
    assert statistics["gate_max"].item() == torch.cat(gates).abs().max().item()
    assert statistics["shut_share"].item() == pytest.approx((torch.cat(gates) < -4).float().mean().item(), rel=1e-6)
    assert 0 < statistics["shut_share"] < 0.5


def test_nothing_is_measured_after_the_end_and_nothing_without_a_pass() -> None:
    model = MMDiT(CONFIG, latent_channels=4, text_dim=6)
    with activation_statistics(model) as statistics:
        pass
    model(torch.randn(1, 4), torch.zeros(0, 6), torch.rand(1), pack([((1, 1),)], CONFIG))
    assert statistics == {}
