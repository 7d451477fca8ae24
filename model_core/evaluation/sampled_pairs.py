"""Pairs that models drew of one prompt, for people to say which is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from model_core.data.keys import key_bytes, keyed_generator, keyed_uniform
from model_core.data.known_pairs import ID_LENGTH, prompt_id
from model_core.data.preferences import Preference, Split
from model_core.data.shards import encode_image
from model_core.evaluation.drawing import Painter, Request, draw
from model_core.recipe import Dimension, Preferences

UNLABELLED = "unlabelled"
DIMENSIONS_OF_TEXT: tuple[Dimension, ...] = ("aesthetics", "alignment")
DIMENSIONS_OF_EDITS: tuple[Dimension, ...] = ("instruction_following", "visual_consistency")
NUM_SEEDS = 2**31


@dataclass(frozen=True, kw_only=True)
class SampledPrompt:
    """What models are asked to draw: `size_px` is (height, width), `sources` are an edit's condition images."""

    text: str
    category: str
    split: Split
    size_px: tuple[int, int]
    sources: Sequence[Image.Image] = ()
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, order=True)
class _Draw:
    """What a picture of a prompt depends on: the model (by its name among the painters), guidance and seed."""

    model: str
    guidance_scale: float
    seed: int


def sampled_preferences(
    prompts: Sequence[SampledPrompt],
    painters: Mapping[str, Painter],
    config: Preferences,
    *,
    seed: int,
    on_drawn: Callable[[int], None],
) -> list[Preference]:
    """Two pictures a prompt, each by a drawn painter at a drawn guidance scale with a seed of its own: a row a dimension, without a label.

    Painters are named by what decides their pictures (digests), since `pair_id` is a function of those names, prompt, sources,
    size, sampling, guidance and seeds: drawn again, the pair is the same one and people's votes on it still hold. What is drawn
    for a prompt does not depend on which others there are.
    """
    ids = [prompt_id(prompt.text, [encode_image(source) for source in prompt.sources]) for prompt in prompts]
    takes = [ids[:index].count(one) for index, one in enumerate(ids)]  # a prompt that is there twice is drawn with other seeds
    choices = [_choose((seed, "sampled pair", *key), sorted(painters), config) for key in zip(ids, takes, strict=True)]
    wanted = [(index, side) for index in range(len(prompts)) for side in (0, 1)]
    pictures: dict[tuple[int, int], bytes] = {}
    for model, scale in sorted({(choice.model, choice.guidance_scale) for pair in choices for choice in pair}):
        members = [
            (index, side) for index, side in wanted if (choices[index][side].model, choices[index][side].guidance_scale) == (model, scale)
        ]
        painter = painters[model]
        painter = replace(painter, sampling=painter.flow_sampling.model_copy(update={"guidance_scale": scale}))
        requests = [
            Request(prompts[index].text, choices[index][side].seed, prompts[index].size_px, prompts[index].sources)
            for index, side in members
        ]
        drawn = draw(painter, requests, on_drawn=on_drawn)
        pictures |= {member: encode_image(picture) for member, picture in zip(members, drawn, strict=True)}
    return [
        row
        for index, prompt in enumerate(prompts)
        for row in _rows(prompt, choices[index], (pictures[index, 0], pictures[index, 1]), painters)
    ]


def _choose(key: tuple[object, ...], models: Sequence[str], config: Preferences) -> tuple[_Draw, _Draw]:
    generator = keyed_generator(*key)
    first, second = (
        _Draw(
            models[int(generator.integers(len(models)))],
            config.guidance_scales[int(generator.integers(len(config.guidance_scales)))],
            int(generator.integers(NUM_SEEDS)),
        )
        for _ in range(2)
    )
    return first, second


def _rows(
    prompt: SampledPrompt, choices: tuple[_Draw, _Draw], pictures: tuple[bytes, bytes], painters: Mapping[str, Painter]
) -> list[Preference]:
    sources = [encode_image(source) for source in prompt.sources]
    (one, first), (two, second) = sorted(zip(choices, pictures, strict=True))
    sampling = [painters[choice.model].flow_sampling.model_dump_json(exclude={"guidance_scale"}) for choice in (one, two)]
    pair_id = key_bytes("sampled pair", prompt.text, prompt.size_px, *sources, one, two, *sampling).hex()[:ID_LENGTH]
    if keyed_uniform("sampled side", pair_id) < 0.5:
        (one, first), (two, second) = (two, second), (one, first)
    return [
        Preference(
            pair_id=pair_id,
            dimension=dimension,
            prompt_id=prompt_id(prompt.text, sources),
            prompt=prompt.text,
            category=prompt.category,
            image_a=first,
            image_b=second,
            label="unlabelled",
            reason=UNLABELLED,
            split=prompt.split,
            sources=sources,
            model_a=one.model,
            model_b=two.model,
            seed_a=one.seed,
            seed_b=two.seed,
            notes=prompt.notes | {"a": {"guidance_scale": one.guidance_scale}, "b": {"guidance_scale": two.guidance_scale}},
        )
        for dimension in (DIMENSIONS_OF_EDITS if sources else DIMENSIONS_OF_TEXT)
    ]
