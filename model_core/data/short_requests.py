"""Short requests for reinforcement learning: what users type, and beside it what they mean by it.

The data hold fine captions and full instructions, and the short request is made of them, so what is meant is known: the caption is what
pictures are held against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from model_core.data.degradation import degrade, left_open
from model_core.data.instruction_summaries import summarise
from model_core.data.keys import keyed_generator, one_of
from model_core.data.prompts import PolicyPrompt
from model_core.data.synthetic import describe, scene_in
from model_core.recipe_enhancer import Degradation

FULL_WORDINGS = (1, 2)  # of plain scenes: those that name everything


@dataclass(frozen=True)
class ShortRequest:
    """A request and what is meant by it: the fine caption, or the full instruction of an edit.

    `left_open` are the attributes of a plain scene that the request neither names nor lets infer.
    """

    request: str
    meant: PolicyPrompt
    left_open: Sequence[str] = ()


def short_request(prompt: PolicyPrompt, rates: Mapping[Degradation, float], *key: object) -> ShortRequest:
    """A prompt made short, by draws of `key`: captions are degraded with these rates, instructions summarised.

    A plain scene is first described in full, since many of its captions leave the background open.
    """
    generator = keyed_generator(*key, "short request")
    if prompt.encoded:
        return ShortRequest(summarise(prompt.prompt, generator)[0], prompt)
    scene = scene_in(prompt.notes)
    fine = prompt.prompt if scene is None else describe(scene, one_of(FULL_WORDINGS, generator))
    degraded = degrade(fine, rates, generator)
    return ShortRequest(degraded.short, replace(prompt, prompt=fine), left_open(degraded))
