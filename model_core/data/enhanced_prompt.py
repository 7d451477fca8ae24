"""What the Prompt Enhancer answers, its schema, and the rules that an answer keeps (R1 3.3; docs/reference/enhancer.md).

    <think>
    color: crimson -> red
    </think>

    {"prompt": "a red circle on the left", "aspect_ratio": "1:1"}

Of an edit, `"follow_image": 1` stands in place of the aspect ratio: the picture whose size the result has, counted from 1.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_core.data.captions import QUOTED, language_of

MAX_RATIO_PART = 32
ASPECT_RATIOS = ("1:1", "2:3", "3:2", "3:4", "4:3", "9:16", "16:9", "1:2", "2:1")  # those that answers are trained on
MIN_LENGTH_SHARE = 0.5  # of the request's signs, quotes left out
MAX_SIGNS = 4000  # of a prompt: about the 1,000 tokens that the generator reads of one (R1)
ANSWER = re.compile(r"<think>\n(?P<thoughts>.*?)\n?</think>\n\n(?P<json>\{.*\})\s*", re.DOTALL)


class _ImageAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str
    aspect_ratio: Annotated[str, Field(pattern=r"^[1-9]\d?:[1-9]\d?$")]


class _EditAnswer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str
    follow_image: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class EnhancedPrompt:
    """A prompt for the generator. `aspect_ratio` ("W:H") is for new pictures, `follow_image` (from 1) for edits; None where unsaid.

    `fallback` says why the prompt is the user's own words; "" when it is the model's.
    """

    prompt: str
    aspect_ratio: str | None = None
    follow_image: int | None = None
    thoughts: tuple[str, ...] = ()
    fallback: str = ""


def answer_text(enhanced: EnhancedPrompt) -> str:
    """The answer that says this."""
    document: dict[str, object] = {"prompt": enhanced.prompt}
    if enhanced.follow_image is None:
        document["aspect_ratio"] = enhanced.aspect_ratio
    else:
        document["follow_image"] = enhanced.follow_image
    return "<think>\n" + "\n".join(enhanced.thoughts) + "\n</think>\n\n" + json.dumps(document, ensure_ascii=False)


def parse_answer(text: str, num_images: int) -> EnhancedPrompt:
    """The answer in `text`, of a request with `num_images` pictures; raises ValueError with the reason when it breaks the schema."""
    match = ANSWER.fullmatch(text)
    if match is None:
        raise ValueError("the answer is not <think>...</think> and one JSON object")
    thoughts = tuple(line for line in match["thoughts"].split("\n") if line)
    schema = _EditAnswer if num_images else _ImageAnswer
    try:
        answer = schema.model_validate_json(match["json"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise ValueError(f"{where}: {first['msg']}") from error
    if not answer.prompt.strip():
        raise ValueError("prompt: it is empty")
    if isinstance(answer, _EditAnswer):
        if answer.follow_image > num_images:
            raise ValueError(f"follow_image: found {answer.follow_image}; allowed is 1 to {num_images}")
        return EnhancedPrompt(prompt=answer.prompt, follow_image=answer.follow_image, thoughts=thoughts)
    if max(map(int, answer.aspect_ratio.split(":"))) > MAX_RATIO_PART:
        raise ValueError(f"aspect_ratio: found {answer.aspect_ratio}; allowed are two numbers up to {MAX_RATIO_PART}")
    return EnhancedPrompt(prompt=answer.prompt, aspect_ratio=answer.aspect_ratio, thoughts=thoughts)


def constraint_problems(request: str, enhanced: EnhancedPrompt) -> list[str]:
    """What the prompt breaks of the rules, in words; empty when it keeps them all.

    Every text that the request quotes stands in the prompt sign by sign, as whole words; prompt and request, without those texts,
    are in one language; the prompt is at least half as long as the request and at most MAX_SIGNS; it has no control signs.
    """
    prompt, texts = enhanced.prompt, quoted_texts(request)
    problems = [f"the text {text!r} is not in the prompt" for text in texts if not stands_in(text, prompt)]
    unquoted = QUOTED.sub(" ", request)
    rest = prompt
    for text in texts:
        rest = rest.replace(text, " ")
    asked, found = language_of(unquoted), language_of(rest)
    if asked != found and "und" not in (asked, found):
        problems.append(f"the request is in {asked}, the prompt in {found}")
    least = MIN_LENGTH_SHARE * len(" ".join(unquoted.split()))
    if not least <= len(prompt) <= MAX_SIGNS:
        problems.append(f"the prompt has {len(prompt)} signs; allowed are {math.ceil(least)} to {MAX_SIGNS}")
    if any(unicodedata.category(sign) == "Cc" for sign in prompt):
        problems.append("the prompt has control signs")
    return problems


def enhanced_or_own(request: str, answer: str, num_images: int) -> EnhancedPrompt:
    """The prompt of an answer that is valid and keeps the rules; else the user's own words, with the reason in `fallback`."""
    try:
        enhanced = parse_answer(answer, num_images)
    except ValueError as error:
        reason = str(error)
    else:
        problems = constraint_problems(request, enhanced)
        if not problems:
            return enhanced
        reason = problems[0]
    return EnhancedPrompt(prompt=request, follow_image=1 if num_images else None, fallback=reason)


def quoted_texts(request: str) -> list[str]:
    """The texts that a request asks to draw: those in double quotes."""
    texts: list[str] = QUOTED.findall(request)
    return texts


def stands_in(text: str, prompt: str) -> bool:
    """Whether the text's signs stand in the prompt as whole words."""
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", prompt) is not None


def aspect_ratio_of(width: int, height: int, ratios: Sequence[str] = ASPECT_RATIOS) -> str:
    """The nearest of the ratios, "W:H", in the logarithm of width over height."""

    def distance(ratio: str) -> float:
        across, down = map(int, ratio.split(":"))
        return abs(math.log(width / height) - math.log(across / down))

    return min(ratios, key=distance)
