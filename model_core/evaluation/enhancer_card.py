"""How well the Prompt Enhancer answers requests that it never saw (docs/reference/enhancer.md says what each figure is)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from model_core.data.degradation import ATTRIBUTES, attributes_in, inferable, left_open, read_scene
from model_core.data.enhanced_prompt import EnhancedPrompt, constraint_problems, parse_answer, quoted_texts, stands_in
from model_core.data.enhancer_examples import Example

FILE_NAME = "enhancer_card.json"
NUM_SHOWN = 12  # examples in the card, of each kind
LEAST = {"restored": 0.8, "quoted_kept": 0.99, "valid_json": 0.99}  # shares below which the report warns


def enhancer_card(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Any]:
    """The figures of new pictures' requests, with those of edits under `edits`; a share of nothing is None."""
    pairs = list(zip(examples, answers, strict=True))
    pictures = [(example, answer) for example, answer in pairs if not example.num_images]
    edits = [(example, answer) for example, answer in pairs if example.num_images]
    return _figures(pictures) | _attribute_figures(pictures) | {"edits": _figures(edits)}


def warnings_of(card: dict[str, Any]) -> list[str]:
    """What a reader of the report is to know: figures that are low."""
    told = []
    for what, figures in (("requests", card), ("edits", card["edits"])):
        for name, least in LEAST.items():
            value = figures.get(name)
            if value is not None and value < least:
                told.append(f"prompt enhancer: {name} is {value:.3f} on {figures['num']} held-out {what}, below {least}")
    return told


def _figures(pairs: Sequence[tuple[Example, str]]) -> dict[str, Any]:
    """What holds for any request. An answer that breaks the schema keeps nothing."""
    read = [_read(example, answer) for example, answer in pairs]
    valid = [enhanced for enhanced in read if enhanced is not None]
    kept, exact, lengths, words, within = [], [], [], [], []
    for (example, _), enhanced in zip(pairs, read, strict=True):
        prompt = enhanced.prompt if enhanced else ""
        texts = quoted_texts(example.request)
        if texts:
            kept.append(all(stands_in(text, prompt) for text in texts))
        exact.append(prompt == example.fine)
        words.append(_share_of_words(example.fine, prompt))
        within.append(enhanced is not None and not constraint_problems(example.request, enhanced))
        if enhanced is not None:
            lengths.append(len(prompt) / len(example.request))
    return {
        "num": len(pairs),
        "valid_json": _mean([enhanced is not None for enhanced in read]),
        "quoted_kept": _mean(kept),
        "constraints_kept": _mean(within),
        "fine_words": _mean(words),
        "exact": _mean(exact),
        "length_ratio": _mean(lengths),
        "examples": [
            {
                "request": example.request,
                "thoughts": list(enhanced.thoughts) if enhanced else [],
                "prompt": enhanced.prompt if enhanced else None,
                "fine": example.fine,
                **({} if enhanced else {"answer": answer}),
            }
            for (example, answer), enhanced in list(zip(pairs, read, strict=True))[:NUM_SHOWN]
        ],
    } | ({"aspect_ratios": sorted({enhanced.aspect_ratio for enhanced in valid if enhanced.aspect_ratio})} if valid else {})


def _attribute_figures(pairs: Sequence[tuple[Example, str]]) -> dict[str, Any]:
    """What holds for plain scenes: attributes that can be inferred, that were left open, and that the request names itself."""
    restored: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    filled, kept = [], []
    for example, answer in pairs:
        found = read_scene(example.fine)
        if found is None:
            continue
        enhanced = _read(example, answer)
        named = attributes_in(enhanced.prompt) if enhanced else {}
        told, opened = inferable(example.degraded), left_open(example.degraded)
        for name, value in told.items():
            restored[name].append(named.get(name) == value)
        filled += [name in named for name in opened]
        kept += [named.get(name) == getattr(found[0], name) for name in ATTRIBUTES if name not in told and name not in opened]
    return {
        "restored": _mean([value for values in restored.values() for value in values]),
        "restored_by_attribute": {name: {"value": _mean(values), "num": len(values)} for name, values in restored.items()},
        "open_filled": _mean(filled),
        "kept": _mean(kept),
    }


def _read(example: Example, answer: str) -> EnhancedPrompt | None:
    try:
        return parse_answer(answer, example.num_images)
    except ValueError:
        return None


def _share_of_words(fine: str, prompt: str) -> float:
    """The share of the fine prompt's different words that stand in a prompt."""
    wanted, found = (set(re.findall(r"\w+", text.lower())) for text in (fine, prompt))
    return len(wanted & found) / max(len(wanted), 1)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
