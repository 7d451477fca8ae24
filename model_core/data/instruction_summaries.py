"""Instructions of edits summarised to what people type (R1 3.3: edits are summarised, not degraded at random).

The report's summaries are a language model's; these follow rules. Every content word stays, so that the instruction can be told
from its summary.
"""

from __future__ import annotations

import re

import numpy as np

from model_core.data.captions import QUOTED
from model_core.data.degradation import Step
from model_core.data.keys import one_of

# (instruction, summaries): the wordings of `model_core.data.edits`, of which one or two words are short for each.
SUMMARIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"change the text (\S+) to (\S+)", ('"{0}" -> "{1}"', 'text "{0}" to "{1}" pls')),
    (r"change the text to (\S+)", ('text -> "{0}"', 'text "{0}" instead')),
    (r"add the text (\S+)", ('add "{0}"', 'put "{0}" there')),
    (r"write the text (\S+)", ('write "{0}"', '"{0}" on it')),
    (r"remove the text (\S+)", ('no "{0}"', '"{0}" away')),
    (r"remove the text", ("no text", "text away")),
    (r"change the background to (.+)", ("background -> {0}", "background to {0} pls")),
    (r"make the background (.+)", ("{0} background", "background {0} please")),
    (r"change the (.+?) to (.+)", ("{0} -> {1}", "{0} to {1} pls")),
    (r"turn the (.+?) into (.+)", ("{0} into {1}", "{1} where {0} is")),
    (r"use the (.+?) of the second image (in|for) the first image", ("2nd {0} {1} 1st", "use 2nd {0} {1} 1st")),
    (r"give the first image the (.+?) of the second image", ("1st gets 2nd {0}", "give 1st the {0} of 2nd")),
    (r"turn it into a (.+) picture", ("{0} picture", "into {0} pls")),
    (r"make it (.+)", ("{0} please", "all {0}")),
    (r"remove the (noise|blur)", ("no {0}", "{0} away")),
    (r"clean up the noisy image", ("too noisy", "clean it up")),
    (r"sharpen the blurred image", ("sharper", "too blurred")),
    (r"make the (\S+) (.+)", ("{0} {1} please", "{1} {0}")),
)
FILLER = re.compile(r"\b(?:please|the|an?|of the|so that|in order to|carefully|slightly)\s+", re.IGNORECASE)


def summarise(instruction: str, generator: np.random.Generator) -> tuple[str, Step]:
    """A short request for the edit, and the step that it takes back; any text to draw stands in double quotes in it.

    An instruction of none of the known wordings loses its articles and fillers, but for quoted text.
    """
    for pattern, summaries in SUMMARIES:
        match = re.fullmatch(pattern, instruction)
        if match:
            form = one_of(summaries, generator)
            return form.format(*match.groups()), Step("summary", "summary", pattern_words(pattern), form_words(form))
    kept = QUOTED.split(instruction)
    short = "".join(f'"{part}"' if place % 2 else FILLER.sub("", part) for place, part in enumerate(kept))
    return short, Step("summary", "summary", "full sentence", "fillers dropped")


def pattern_words(pattern: str) -> str:
    """The fixed words of an instruction, gaps as dots."""
    return re.sub(r"\([^)]*\)", "..", pattern)


def form_words(form: str) -> str:
    """The fixed words of a summary, gaps as dots."""
    return re.sub(r'"?\{\d\}"?', "..", form)
