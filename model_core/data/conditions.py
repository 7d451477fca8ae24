"""What a sample is conditioned on: a prompt for the condition encoder, or the states that it has left beside the latents."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model_core.data.latents import LatentGroup
from model_core.data.states import EMPTY


@dataclass(frozen=True)
class Condition:
    """A prompt, the `runs` of its text tokens, and where they are stored its `states` (L, dim) bfloat16.

    Without states the encoder is to run on the prompt.
    """

    prompt: str
    runs: tuple[int, ...]
    states: Tensor | None = None


def condition_of(group: LatentGroup, row: int, name: str | None, *, empty: Condition) -> Condition:
    """That of a row's prompt of a name; of None, no prompt: the row's own where its references were seen, else `empty`."""
    if not group.states:
        return Condition(group.prompts[name][row], (int(group.prompt_tokens[name][row]),)) if name else Condition("", empty.runs)
    if name is None and EMPTY not in group.states:
        return empty
    stored = group.states[name or EMPTY].row(row)
    return Condition(group.prompts[name][row] if name else "", stored.runs, stored.states)
