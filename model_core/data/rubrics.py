"""What people are asked of a pair, by dimension. A change of any word here is another rubric: raise `RUBRIC_VERSION` with it.

What is weighed is that of the model's own five rewards (R1 3.4, R4 3.2: scores from 1 to 5, pointwise).
"""

from __future__ import annotations

from dataclasses import dataclass

from model_core.recipe_alignment import Dimension

SCALE = ("bad", "poor", "fair", "good", "excellent")  # of the scores 1 to 5

INVALID_REASONS = {
    "broken": "A picture is broken or empty",
    "unclear": "The text asks for nothing that can be judged",
    "harmful": "Nobody should have to look at it",
    "unsure": "I cannot judge this pair",
    "source": "The source picture does not belong to the text",  # of edits alone
}


@dataclass(frozen=True)
class Rubric:
    """The question about a pair; what counts, one sentence each; and what does not."""

    question: str
    counts: tuple[str, ...]
    ignore: str


RUBRICS: dict[Dimension, Rubric] = {
    "aesthetics": Rubric(
        "Which picture looks better?",
        (
            "Balance: the parts of the picture hold together.",
            "Light and colour are coherent and suit what is shown.",
            "Textures are clean: no noise, smear, banding or patterns that belong to nothing.",
        ),
        "How well it fits the prompt does not count here.",
    ),
    "alignment": Rubric(
        "Which picture shows better what the prompt says?",
        (
            "Everything that is named is there, in the right number.",
            "Colours, shapes, places, relations and actions are as told; a text is spelled as told.",
            "Nothing is there that contradicts the prompt.",
        ),
        "Beauty does not count here: an ugly picture of the right thing is better than a fine one of another.",
    ),
    "portrait": Rubric(
        "Which picture shows people better?",
        (
            "Anatomy: hands, fingers, limbs and teeth are whole and in number.",
            "Faces are well proportioned, and each is somebody.",
            "Skin and hair look real, neither wax nor blur.",
        ),
        "A pair without people is invalid: it cannot be judged.",
    ),
    "instruction_following": Rubric(
        "Which picture carries out the instruction better?",
        (
            "The core of the instruction is done, wholly and at the right place.",
            "What it asks beside its core is done too.",
            "The change fits in: it looks like part of the picture.",
        ),
        "What happened to the rest of the picture does not count here. A source that came back unchanged is the worst answer.",
    ),
    "visual_consistency": Rubric(
        "Which picture keeps better what the instruction leaves alone?",
        (
            "What should stay is where it was, of the same shape and size.",
            "Its colours, textures and texts are those of the source.",
            "People stay the same people.",
        ),
        "Whether the instruction was carried out does not count here.",
    ),
}
