"""Fine captions made short requests, one operation at a time, each of which can be reversed (R1 3.3; docs/reference/enhancer.md).

The report's operations are chosen by a language model; here they follow rules, by clauses and word lists. English captions alone
are changed. The text to draw is never touched, and stands in double quotes in the request.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from model_core.data.captions import QUOTED, language_of
from model_core.data.degradation_words import BLURS, COLLOQUIAL, KEYWORDS, PEOPLE, PREPOSITIONS, VAGUE
from model_core.data.keys import one_of
from model_core.data.synthetic import BACKGROUNDS, COLORS, PHOTO, POSITIONS, SHAPES, Scene, article
from model_core.recipe_enhancer import DEGRADATIONS, Degradation

PromptClass = Literal["general", "portrait", "text", "complex_text"]
# R1 names the classes and says that they choose the operations, not which: ours. What would blur where dense text stands is left out.
APPLICABLE: dict[PromptClass, tuple[Degradation, ...]] = {
    "general": DEGRADATIONS,
    "portrait": ("style", "colloquial", "lighting", "texture", "background", "subject"),
    "text": ("style", "colloquial", "lighting", "layout", "background", "subject"),
    "complex_text": ("style", "colloquial", "lighting", "background"),
}
COMPLEX_SIGNS = 40  # of quoted text, beyond which it is complex
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "position": POSITIONS,
    "background": tuple(BACKGROUNDS),
}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
OF_ASPECT: tuple[tuple[Degradation, str], ...] = (
    ("subject", "color"),
    ("subject", "shape"),
    ("layout", "position"),
    ("background", "background"),
)
_SUBJECT = r"an? (?P<color>\w+) (?P<shape>\w+) on the (?P<position>\w+)"
SCENE_WORDINGS = {
    1: re.compile(_SUBJECT + r" of an? (?P<background>\w+) background(?: with the text (?P<text>\S+))?"),
    2: re.compile(r"an? (?:(?P<background>\w+) picture|photo) with " + _SUBJECT + r"(?: and the text (?P<text>\S+))?"),
}


@dataclass(frozen=True)
class Step:
    """One operation: `fine` is what the caption said of the aspect, `short` what the request says in its place, "" when nothing."""

    operation: str
    aspect: str
    fine: str
    short: str


@dataclass(frozen=True)
class Degraded:
    """A short request and the operations that made it of a caption, in their order."""

    short: str
    steps: tuple[Step, ...]


def degrade(caption: str, rates: Mapping[Degradation, float], generator: np.random.Generator) -> Degraded:
    """A caption made short: of the operations that apply, each is taken with its rate; one that has no rate is not taken.

    A caption in another language than English comes out as it is.
    """
    if language_of(caption) != "en":
        return Degraded(caption, ())
    allowed = APPLICABLE[prompt_class(caption)]
    rates = {operation: rates.get(operation, 0.0) if operation in allowed else 0.0 for operation in DEGRADATIONS}
    scene = read_scene(caption)
    degraded = _degrade_clauses(caption, rates, generator) if scene is None else _degrade_scene(*scene, rates, generator)
    return _made_colloquial(degraded, generator) if generator.random() < rates["colloquial"] else degraded


def prompt_class(caption: str) -> PromptClass:
    """The class of a caption: by the text that is to be drawn, then by whether people are shown."""
    scene, quotes = read_scene(caption), QUOTED.findall(caption)
    if len(quotes) > 1 or sum(map(len, quotes)) > COMPLEX_SIGNS:
        return "complex_text"
    if quotes or (scene is not None and scene[0].text):
        return "text"
    return "portrait" if re.search(rf"\b(?:{PEOPLE})\b", caption, re.IGNORECASE) else "general"


def thoughts(steps: Sequence[Step]) -> list[str]:
    """The chain of thought: the operations reversed, a line each, the last one first. A dash stands for nothing."""
    return [f"{step.aspect}: {step.short or '-'} -> {step.fine or '-'}" for step in reversed(steps)]


def inferable(degraded: Degraded) -> dict[str, str]:
    """Of a plain scene: the attributes whose own word is gone, but which what remains determines, with their values."""
    return {step.aspect: step.fine for step in degraded.steps if step.aspect in ATTRIBUTES and step.short}


def left_open(degraded: Degraded) -> tuple[str, ...]:
    """Of a plain scene: the attributes that went without a trace."""
    return tuple(step.aspect for step in degraded.steps if step.aspect in ATTRIBUTES and not step.short)


def attributes_in(prompt: str) -> dict[str, str]:
    """The attributes of a plain scene that a prompt names, with their values; one with two different values is not named."""
    words = set(re.findall(r"\w+", prompt.lower()))
    named = {name: [value for value in values if value in words] for name, values in ATTRIBUTES.items()}
    return {name: values[0] for name, values in named.items() if len(values) == 1}


def read_scene(caption: str) -> tuple[Scene, int] | None:
    """The plain scene and the wording of a caption that names everything (`synthetic.describe`); None for any other caption."""
    for wording, pattern in SCENE_WORDINGS.items():
        match = pattern.fullmatch(caption)
        if match:
            scene = Scene(match["color"], match["shape"], match["position"], match["background"] or PHOTO, match["text"] or "")
            if all(getattr(scene, name) in (*values, PHOTO) for name, values in ATTRIBUTES.items()):
                return scene, wording
    return None


def _degrade_scene(scene: Scene, wording: int, rates: Mapping[Degradation, float], generator: np.random.Generator) -> Degraded:
    """Words for colour and shape are blurred; those for position and background are blurred or dropped.

    The text stands opposite the shape: in place of where the shape is, the request may say where the text is.
    """
    words, text_place, steps = scene.to_dict(), "", []
    for operation, aspect in OF_ASPECT:
        if generator.random() >= rates[operation]:
            continue
        fine = words[aspect]
        blurs = BLURS[aspect].get(fine, ())
        choices = ["blur"] * bool(blurs) + ["drop"] * (operation != "subject") + ["text"] * (aspect == "position" and bool(scene.text))
        choice = one_of(choices, generator)
        words[aspect] = one_of(blurs, generator) if choice == "blur" else ""
        told = words[aspect]
        if choice == "text":
            text_place = f" on the {OPPOSITE[fine]}"
            told = f"text{text_place}"
        steps.append(Step(operation, aspect, fine, told))
    return Degraded(_request(words, wording, text_place), tuple(steps))


def _request(words: Mapping[str, str], wording: int, text_place: str) -> str:
    """The request that says the words at hand in the order of the caption's wording."""
    subject = f"{article(words['color'])} {words['color']} {words['shape']}"
    place = f" on the {words['position']}" if words["position"] else ""
    text = f'"{words["text"]}"{text_place}' if words["text"] else ""
    ground = words["background"]
    if wording == 1:
        behind = f" {'of' if place else 'on'} {article(ground)} {ground} background" if ground else ""
        return f"{subject}{place}{behind}" + (f" with {text}" if text else "")
    picture = "photo" if ground == PHOTO else f"{ground} picture".strip()
    return f"{article(picture)} {picture} with {subject}{place}" + (f" and {text}" if text else "")


def _degrade_clauses(caption: str, rates: Mapping[Degradation, float], generator: np.random.Generator) -> Degraded:
    """Clauses about an aspect are dropped or made vague, words for colours made less usual; clauses with quoted text stay."""
    quotes = [match[0] for match in QUOTED.finditer(caption)]
    short, steps = QUOTED.sub(_HIDDEN, caption), []
    for aspect in ("style", "lighting", "texture", "layout", "background"):
        clause = _clause(short, aspect) if generator.random() < rates[aspect] else None
        if clause is not None:
            begin, end = clause
            vague = one_of(VAGUE[aspect], generator) if generator.random() < 0.5 else ""
            steps.append(Step(aspect, aspect, short[begin:end].strip(" ,;."), vague))
            short = _tidy(f"{short[:begin]} {vague} {short[end:]}")
    colors = [word for word in re.findall(r"[a-z]+", short) if word in BLURS["color"]]
    for color in dict.fromkeys(colors):
        if generator.random() < rates["subject"]:
            told = one_of(BLURS["color"][color], generator)
            steps.append(Step("subject", "color", color, told))
            short = re.sub(rf"\b{color}\b", told, short)
    for quote in quotes:
        short = short.replace(_HIDDEN, f'"{quote[1:-1]}"', 1)
    return Degraded(short, tuple(steps))


_HIDDEN = "\ue000"  # stands for a quoted text while clauses are sought: a sign of the private area


def _clause(caption: str, aspect: str) -> tuple[int, int] | None:
    """Where the first clause about an aspect begins and ends: what follows a preposition, else all between two commas.

    None when there is none, or it holds quoted text, or it is the caption's first words, which name the subject.
    """
    for segment in re.finditer(r"[^,;.]+", caption):
        keyword = re.search(rf"\b(?:{KEYWORDS[aspect]})\b", segment[0], re.IGNORECASE)
        if keyword is None:
            continue
        begins = [match.start() for match in re.finditer(rf"\b(?:{PREPOSITIONS})\b", segment[0]) if match.start() <= keyword.start()]
        begin = segment.start() + begins[-1] if begins else segment.start()
        followed = re.search(rf" (?:and|{PREPOSITIONS})\b", segment[0][keyword.end() :])
        end = segment.start() + keyword.end() + followed.start() if begins and followed else segment.end()
        if caption[:begin].strip() and _HIDDEN not in caption[begin:end]:
            return begin, end
    return None


def _tidy(text: str) -> str:
    """The text with single spaces, and without commas that nothing stands between."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s+([,;.])", r"\1", text)
    return re.sub(r"[,;](?=[,;.])|[,;]\s*$", "", text).strip()


def _made_colloquial(degraded: Degraded, generator: np.random.Generator) -> Degraded:
    before, after = one_of(COLLOQUIAL, generator)
    said = " ".join(part for part in (before, degraded.short, after) if part)
    step = Step("colloquial", "wording", "", " ".join(part for part in (before, after) if part))
    return replace(degraded, short=said, steps=(*degraded.steps, step))
