"""The transformer on this machine's CPU against diffusers' module: forward and backward with the same weights and inputs.

Prints one JSON line a measurement. Ours is given a packed stream, which is planned anew in each call; theirs a batch, as its own
pipeline gives it. Both run in turn, so that a machine whose speed drifts does so for both; who goes first changes with each round.
Figures are medians over rounds, and a ratio above one says that ours is faster.

    python -m benchmarks.mmdit
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from diffusers import QwenImage21Transformer2DModel
from torch import Tensor

from benchmarks.against_diffusers import say_against_diffusers
from benchmarks.machine import machine
from model_core.models.mmdit_diffusers import from_diffusers
from model_core.models.segments import num_tokens
from model_core.models.stream import pack

CHANNELS, TEXT_DIM = 64, 256


def compare(size: str, *, heads: int, axes: tuple[int, int, int], side: int, num_text: int, batch: int, num_conditions: int = 0) -> None:
    """Says how fast both give velocities and all gradients for samples of one shape, with the same random weights."""
    torch.manual_seed(0)
    theirs = QwenImage21Transformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=4,
        attention_head_dim=sum(axes),
        num_attention_heads=heads,
        context_in_dim=TEXT_DIM,
        axes_dims_rope=axes,
    )
    ours = from_diffusers(dict(theirs.config), theirs.state_dict())
    grid = (side, side)
    num_pictures = num_tokens(grid) * (1 + num_conditions)
    pictures, text = torch.randn(batch, num_pictures, CHANNELS), torch.randn(batch, num_text, TEXT_DIM)
    t = torch.rand(batch)

    def our_velocity() -> Tensor:
        stream = pack([(num_text, *[grid] * (1 + num_conditions))] * batch, ours.config)
        return ours(pictures.flatten(0, 1), text.flatten(0, 1), t, stream).unflatten(0, (batch, -1))

    num_slots = num_pictures // 4
    slots = torch.cat((torch.zeros(batch, num_text, dtype=torch.bool), torch.ones(batch, num_slots, dtype=torch.bool)), dim=1)
    # The states of a condition image's slots are there, and are not read.
    states = torch.cat((text, text.new_zeros(batch, num_slots - num_tokens(grid) // 4, TEXT_DIM)), dim=1)

    def their_velocity() -> Tensor:
        shapes = [[(1, *grid)] * (1 + num_conditions)] * batch
        out = theirs(hidden_states=pictures, encoder_hidden_states=states, timestep=t, img_shapes=shapes, img_mask=slots, return_dict=False)
        return out[0][:, -num_tokens(grid) :]

    def step(velocity: Tensor, parameters: Sequence[Tensor]) -> None:
        velocity.square().mean().backward()
        for parameter in parameters:
            parameter.grad = None

    our_parameters, their_parameters = list(ours.parameters()), list(theirs.parameters())
    say_against_diffusers(
        "forward and backward",
        lambda: step(our_velocity(), our_parameters),
        lambda: step(their_velocity(), their_parameters),
        (our_velocity, their_velocity),
        size=size,
        width=heads * sum(axes),
        layers=4,
        samples=batch,
        text_tokens=num_text,
        target_tokens=num_tokens(grid),
        condition_images=num_conditions,
    )


def main() -> None:
    """Measures both sizes, and an edit."""
    print(json.dumps({"machine": machine()}))
    compare("tiny", heads=4, axes=(8, 20, 20), side=4, num_text=24, batch=8)
    compare("tiny edit", heads=4, axes=(8, 20, 20), side=4, num_text=24, batch=8, num_conditions=1)
    compare("middle", heads=8, axes=(16, 56, 56), side=16, num_text=64, batch=2)


if __name__ == "__main__":
    main()
