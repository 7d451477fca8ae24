"""Short requests for reinforcement learning: what users type, and beside it what they mean by it.

The data hold fine captions and full instructions, and short requests are made of them, so what is meant is known: pictures are held
against that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from model_core.data.degradation import left_open
from model_core.data.enhancer_examples import FinePrompt, example_of
from model_core.data.prompts import PolicyPrompt
from model_core.data.synthetic import scene_in
from model_core.recipe_enhancer import Degradation


@dataclass(frozen=True)
class ShortRequest:
    """A request and what is meant by it: the fine caption, or the full instruction of an edit.

    `left_open` are the attributes of a plain scene that the request neither names nor lets infer.
    """

    request: str
    meant: PolicyPrompt
    left_open: Sequence[str] = ()


def short_request(prompt: PolicyPrompt, rates: Mapping[Degradation, float], *key: object) -> ShortRequest:
    """A prompt made short, by draws of `key`, as the supervised examples are: a plain scene is first described in full."""
    scene = None if prompt.encoded else scene_in(prompt.notes)
    example = example_of(FinePrompt(fine=prompt.prompt, scene=scene, num_images=len(prompt.encoded)), rates, *key, "short request")
    return ShortRequest(example.request, replace(prompt, prompt=example.fine), left_open(example.degraded))
