"""The transformer against the successor's public code: the same weights give the same velocities and gradients."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from diffusers import QwenImage21Transformer2DModel
from torch import Tensor

from model_core.documents import UserError
from model_core.models.mmdit import MMDiT
from model_core.models.mmdit_diffusers import from_diffusers, to_diffusers
from model_core.models.rope import rotary_table, sample_positions
from model_core.models.segments import Segment, num_tokens
from model_core.models.stream import pack
from model_core.recipe import MMDiTModel


def oracle(draw: random.Random) -> QwenImage21Transformer2DModel:
    """A small transformer of a drawn shape, whose weights let the velocities be about one."""
    torch.manual_seed(draw.randrange(1000))
    axes = draw.choice([(4, 6, 6), (2, 4, 2), (8, 8, 8), (2, 8, 6)])
    model = QwenImage21Transformer2DModel(
        in_channels=(channels := draw.choice([4, 8, 64])),
        out_channels=channels,
        num_layers=draw.randint(1, 4),
        attention_head_dim=sum(axes),
        num_attention_heads=draw.randint(1, 4),
        context_in_dim=draw.choice([6, 12, 32]),
        mlp_ratio=draw.randint(1, 4),
        axes_dims_rope=axes,
        causal_condition=draw.random() < 0.5,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.7 / parameter.shape[1] ** 0.5))
    return model.eval()


def drawn_sample(draw: random.Random) -> tuple[Segment, ...]:
    """Text, up to three condition images with text between some of them, text, and the target; sides are even, as there."""

    def side() -> int:
        return 2 * draw.randint(1, 3)

    segments: list[Segment] = [draw.randint(1, 6)]
    for _ in range(draw.randint(0, 3)):
        segments += [(side(), side())] + [draw.randint(1, 4)] * draw.randint(0, 1)
    return (*segments, (side(), side()))


def slot_mask(sample: tuple[Segment, ...]) -> Tensor:
    """True at the vision-language sequence's image slots, each of which stands for 2 x 2 latent tokens."""
    return torch.cat([torch.full((s,), False) if isinstance(s, int) else torch.full((num_tokens(s) // 4,), True) for s in sample])


def ask_oracle(model: Any, sample: tuple[Segment, ...], pictures: Tensor, text: Tensor, t: Tensor) -> Tensor:
    """Velocities (B, N, C) for pictures (B, I, C) and text (B, T, text_dim) of samples of one shape."""
    mask = slot_mask(sample)
    held = len(mask) - num_tokens(sample[-1]) // 4
    states = text.new_zeros(len(text), held, text.shape[2]).masked_scatter(~mask[:held, None], text)
    grids = [[(1, *segment) for segment in sample if not isinstance(segment, int)]] * len(text)
    arguments = {"timestep": t, "img_shapes": grids, "img_mask": mask[None].expand(len(text), -1)}
    velocity: Tensor = model(hidden_states=pictures, encoder_hidden_states=states, **arguments).sample
    return velocity[:, -num_tokens(sample[-1]) :]


@pytest.mark.parametrize("seed", range(12))
def test_velocities_and_gradients_are_those_of_the_public_code(seed: int) -> None:
    draw = random.Random(seed)
    theirs, sample = oracle(draw), drawn_sample(draw)
    ours = from_diffusers(dict(theirs.config), theirs.state_dict())
    torch.manual_seed(seed)
    num_pictures = sum(num_tokens(segment) for segment in sample if not isinstance(segment, int))
    num_text = sum(segment for segment in sample if isinstance(segment, int))
    pictures, text = torch.randn(2, num_pictures, ours.latent_channels), torch.randn(2, num_text, ours.text_dim)
    t = torch.tensor([0.2, 0.9])

    expected = ask_oracle(theirs, sample, pictures, text, t)
    found = ours(pictures.flatten(0, 1), text.flatten(0, 1), t, pack([sample, sample], ours.config)).unflatten(0, (2, -1))
    assert found.abs().mean() > 0.1
    assert (found - expected).abs().max() <= 1e-5

    weigh = torch.randn_like(expected) / expected.numel()
    for velocity in (expected, found):
        (velocity * weigh).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    with torch.no_grad():  # the layout is linear in the weights, so gradients are carried over as weights are
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)
        ours.text_in.norm.weight.add_(1)
    for name, gradient in to_diffusers(ours)[1].items():
        assert (gradient - gradients[name]).abs().max() <= 1e-5, name


@pytest.mark.parametrize("seed", range(10))
def test_running_positions_are_those_of_the_successor(seed: int) -> None:
    draw = random.Random(seed)
    theirs, sample = oracle(draw), drawn_sample(draw)
    is_picture = torch.cat([torch.full((num_tokens(segment),), not isinstance(segment, int)) for segment in sample])
    grids = [(1, *segment) for segment in sample if not isinstance(segment, int)]
    expected = theirs.pos_embed(grids, is_picture, device=torch.device("cpu"))
    cos, sin = rotary_table(torch.from_numpy(sample_positions(sample, scheme="running")), axes=theirs.config.axes_dims_rope, theta=10_000.0)
    assert torch.allclose(cos, expected.real, atol=2e-6)
    assert torch.allclose(sin, expected.imag, atol=2e-6)


@pytest.mark.parametrize("seed", range(10))
def test_ordinal_positions_are_those_of_the_predecessor(seed: int) -> None:
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    draw = random.Random(seed)
    target, *conditions = [(draw.randint(1, 7), draw.randint(1, 7)) for _ in range(draw.randint(1, 4))]
    length = draw.randint(1, 9)
    oracle = QwenEmbedRope(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    vision, text = oracle([[(1, *target), *((1, *shape) for shape in conditions)]], max_txt_seq_len=length, device=torch.device("cpu"))
    positions = torch.from_numpy(sample_positions((length, *conditions, target), scheme="ordinal"))
    cos, sin = rotary_table(positions, axes=(16, 56, 56), theta=10_000.0)
    num_target = num_tokens(target)
    expected = torch.cat((text, vision[num_target:], vision[:num_target]))  # there the target comes first and text apart
    assert torch.allclose(cos, expected.real, atol=1e-5)
    assert torch.allclose(sin, expected.imag, atol=1e-5)


def test_weights_go_there_and_back_bitwise() -> None:
    theirs = oracle(random.Random(3))
    config, state = to_diffusers(from_diffusers(dict(theirs.config), theirs.state_dict()))
    again = QwenImage21Transformer2DModel.from_config(config)
    again.load_state_dict(state)
    for name, value in theirs.state_dict().items():
        if name == "txt_in.text_norm.weight":  # scale - 1 there
            assert torch.allclose(again.state_dict()[name], value, atol=1e-7)
        else:
            assert torch.equal(again.state_dict()[name], value), name


def test_weights_in_half_precision_lose_nothing_on_the_way() -> None:
    theirs = oracle(random.Random(3)).bfloat16()
    ours = from_diffusers(dict(theirs.config), theirs.state_dict())
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.text_in.norm.weight, theirs.txt_in.text_norm.weight.float() + 1)
    assert torch.equal(ours.image_in.weight, theirs.img_in.weight.float())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"attention": "full"}, "attention: found full"),
        ({"rope_positions": "ordinal"}, "rope_positions: found ordinal"),
        ({"rope_theta": 20.0}, "rope_theta: found 20.0"),
        ({"mlp_ratio": 2.5}, "mlp_ratio: found 2.5"),
    ],
)
def test_a_model_that_cannot_be_told_there_is_refused_by_name(change: dict[str, object], told: str) -> None:
    exact = {
        "attention": "block_causal",
        "rope_positions": "running",
        "num_layers": 1,
        "num_heads": 1,
        "head_dim": 16,
        "rope_axes": [4, 6, 6],
    }
    model = MMDiT(MMDiTModel.model_validate(exact | change), latent_channels=4, text_dim=6)
    with pytest.raises(UserError, match=told):
        to_diffusers(model)
