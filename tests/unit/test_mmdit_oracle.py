"""The transformer against the successor's public code: the same weights give the same velocities."""

from typing import Any

import pytest
import torch
from diffusers import QwenImage21Transformer2DModel
from torch import Tensor

from model_core.models.mmdit import MMDiT
from model_core.recipe import MMDiTModel

LAYERS, HEADS, HEAD_DIM, AXES, CHANNELS, TEXT_DIM = 2, 2, 16, (4, 6, 6), 8, 12
TEXT_LENGTH, SHAPE, REFERENCES = 5, (4, 2), [(2, 2), (2, 4)]

NAMES = {
    "image_in.weight": "img_in.weight",
    "text_in.layers.0.weight": "txt_in.in_layer.weight",
    "text_in.layers.2.weight": "txt_in.out_layer.weight",
    "time_in.weight": "time_text_embed.timestep_embedder.linear_1.weight",
    "time_out.weight": "time_text_embed.timestep_embedder.linear_2.weight",
    "modulation.weight": "modulation.1.weight",
    "final_scale.weight": "norm_out.linear.weight",
    "image_out.weight": "proj_out.weight",
}
BLOCK_NAMES = {
    "qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "query_norm": ("attn.norm_q",),
    "key_norm": ("attn.norm_k",),
    "attention_out": ("attn.to_out.0",),
    "mlp_in": ("img_mlp.gate_layer", "img_mlp.proj"),
    "mlp_out": ("img_mlp.out",),
}


def oracle(*, condition_at_t0: bool) -> QwenImage21Transformer2DModel:
    torch.manual_seed(0)
    model = QwenImage21Transformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        context_in_dim=TEXT_DIM,
        axes_dims_rope=AXES,
        causal_condition=condition_at_t0,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 1 / parameter.shape[1] ** 0.5))
    return model.eval()


def translated(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The oracle's weights by our names. Its text norm stores scale - 1; it keeps apart the projections that we join."""
    ours = {mine: theirs[name] for mine, name in NAMES.items()} | {"text_in.norm.weight": theirs["txt_in.text_norm.weight"] + 1}
    for layer in range(LAYERS):
        for mine, parts in BLOCK_NAMES.items():
            stacked = torch.cat([theirs[f"transformer_blocks.{layer}.{part}.weight"] for part in parts])
            ours[f"blocks.{layer}.{mine}.weight"] = stacked
    return ours


def slots(shapes: list[tuple[int, int]]) -> int:
    """Places of the vision-language sequence, each of which stands for 2 x 2 latent tokens."""
    return sum(height * width for height, width in shapes) // 4


@pytest.mark.parametrize("condition_at_t0", [False, True])
@pytest.mark.parametrize("references", [[], REFERENCES])
@pytest.mark.parametrize("padded", [0, 2])
def test_block_causal_velocities_are_those_of_the_public_code(condition_at_t0: bool, references: list[Any], padded: int) -> None:
    theirs = oracle(condition_at_t0=condition_at_t0)
    config = MMDiTModel(
        num_layers=LAYERS, num_heads=HEADS, head_dim=HEAD_DIM, rope_axes=AXES, attention="block_causal", condition_at_t0=condition_at_t0
    )
    ours = MMDiT(config, latent_channels=CHANNELS, text_dim=TEXT_DIM).eval()
    ours.load_state_dict(translated(theirs.state_dict()))

    torch.manual_seed(1)
    shapes = [*references, SHAPE]
    latents = [torch.randn(2, height * width, CHANNELS) for height, width in shapes]
    text, t = torch.randn(2, TEXT_LENGTH, TEXT_DIM), torch.tensor([0.2, 0.9])
    text_mask = torch.ones(2, TEXT_LENGTH, dtype=torch.bool)
    text_mask[1, TEXT_LENGTH - padded :] = False

    is_slot = torch.tensor([[False] * TEXT_LENGTH + [True] * slots(shapes)]).expand(2, -1)
    held = slots(references)
    grids = [[(1, height, width) for height, width in shapes]] * 2
    with torch.no_grad():
        expected = theirs(
            hidden_states=torch.cat(latents, dim=1),
            encoder_hidden_states=torch.cat((text, torch.zeros(2, held, TEXT_DIM)), dim=1),
            timestep=t,
            img_shapes=grids,
            img_mask=is_slot,
            encoder_hidden_states_mask=torch.cat((text_mask, torch.ones(2, held, dtype=torch.bool)), dim=1),
        ).sample[:, -SHAPE[0] * SHAPE[1] :]
        # The successor counts positions along the sequence, we by the report of 1.0: the positions are compared elsewhere.
        is_image = torch.tensor([False] * TEXT_LENGTH + [True] * sum(height * width for height, width in shapes))
        rotary = theirs.pos_embed(grids[0], is_image, device=torch.device("cpu"))
        ours._rotary = lambda *_: (rotary.real, rotary.imag)  # type: ignore[method-assign]
        found = ours(latents[-1], t, text, text_mask, SHAPE, list(zip(latents[:-1], references, strict=True)))
    assert found.abs().mean() > 0.1
    assert torch.allclose(found, expected, atol=2e-5)
