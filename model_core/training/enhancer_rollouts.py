"""Rollouts of the Prompt Enhancer: a group of answers to each short request, the pictures that they lead to, and their scores.

Every draw is keyed by (seed, update, prompt, sample): no generator has a state, and a restart changes nothing of what is drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from model_core.data.enhanced_prompt import constraint_problems, parse_answer
from model_core.data.keys import keyed_generator
from model_core.data.short_requests import ShortRequest
from model_core.evaluation.drawing import Painter, Request, draw
from model_core.models.condition import ConditionEncoder
from model_core.models.enhancer import PromptEnhancer
from model_core.recipe_enhancer import CONSTRAINTS
from model_core.rewards.verdict import Score, Scorer, Value
from model_core.training.rollouts import score_request

NUM_SEEDS = 2**31


@dataclass(frozen=True)
class Candidate:
    """An answer: its tokens, what it says, and what is drawn for it: its prompt, or the user's own words where it may not be used.

    `is_valid` says that it follows the schema; `problems` are the rules that it breaks. `cut` says that it never came to its end.
    """

    tokens: list[int]
    thoughts: tuple[str, ...]
    drawn: str
    is_valid: bool
    problems: Sequence[str]
    cut: bool

    @property
    def constraints(self) -> float:
        """What the rules give: 1 where all are kept, less with every one that is broken, 0 for an answer that breaks the schema.

        Graded, so that a group in which each answer breaks some rule still tells better from worse.
        """
        return 1 / (1 + len(self.problems)) if self.is_valid else 0.0


def read_candidate(enhancer: PromptEnhancer, encoder: ConditionEncoder, asked: ShortRequest, tokens: list[int]) -> Candidate:
    """What an answer to a request comes to; that the generator's encoder can read the prompt is one of the rules."""
    cut = not tokens or tokens[-1] != enhancer.end_id
    try:
        enhanced = parse_answer(enhancer.text(tokens), len(asked.meant.encoded))
    except ValueError as error:
        return Candidate(tokens, (), asked.request, False, (str(error),), cut)
    problems = constraint_problems(asked.request, enhanced)
    if not encoder.reads(enhanced.prompt):
        problems = [*problems, f"the generator reads at most {encoder.max_tokens} tokens and no marks of a chat"]
    return Candidate(tokens, enhanced.thoughts, asked.request if problems else enhanced.prompt, True, problems, cut)


def sample_candidates(
    enhancer: PromptEnhancer,
    encoder: ConditionEncoder,
    asked: Sequence[ShortRequest],
    *,
    update: int,
    group_size: int,
    max_new_tokens: int,
    seed: int,
) -> list[list[Candidate]]:
    """`group_size` answers to each of an update's requests, drawn from the policy itself."""
    repeated = [one for one in asked for _ in range(group_size)]
    keys = [(seed, "enhancer policy", update, one.meant.prompt_id, sample) for one in asked for sample in range(group_size)]
    tokens = enhancer.generate(
        [one.request for one in repeated],
        num_images=[len(one.meant.encoded) for one in repeated],
        max_new_tokens=max_new_tokens,
        keys=keys,
        temperature=1.0,  # the policy whose log-probabilities are learned from is the one that is drawn from
    )
    candidates = [read_candidate(enhancer, encoder, one, answer) for one, answer in zip(repeated, tokens, strict=True)]
    return [candidates[first : first + group_size] for first in range(0, len(candidates), group_size)]


def picture_seed(asked: ShortRequest, *, update: int, seed: int) -> int:
    """The seed of a group's pictures: one noise for all, so that they differ by their prompts alone."""
    return int(keyed_generator(seed, "enhancer pictures", update, asked.meant.prompt_id).integers(NUM_SEEDS))


def draw_prompts(
    painter: Painter, asked: Sequence[ShortRequest], prompts: Sequence[Sequence[str]], seeds: Sequence[int]
) -> list[list[Image.Image]]:
    """A picture of each of the prompts (P groups) written for a request, with the group's seed; equal prompts are drawn once.

    All have the request's size, whatever form an answer asks for: pictures of one group must be comparable.
    """
    wanted = list(dict.fromkeys((place, prompt) for place, group in enumerate(prompts) for prompt in group))
    requests = [Request(prompt, seeds[place], asked[place].meant.size_px, asked[place].meant.sources) for place, prompt in wanted]
    drawn = dict(zip(wanted, draw(painter, requests, on_drawn=lambda _: None), strict=True))
    return [[drawn[place, prompt] for prompt in group] for place, group in enumerate(prompts)]


def score_pictures(
    scorer: Scorer, asked: Sequence[ShortRequest], pictures: Sequence[Sequence[Image.Image]], *, key: str
) -> list[list[dict[str, Score]]]:
    """Scores of P groups of pictures.

    They are held against what the user means, never against the prompt that was written: a training row's fine caption is what its
    short request stands for, while a prompt that asks for little is easily obeyed, and the policy would learn to write it.
    """
    requests, places = [], []
    for place, group in enumerate(pictures):
        for picture in group:
            digest = hashlib.sha256(picture.tobytes()).hexdigest()[:16]
            meant = asked[place].meant
            requests.append(score_request(meant, picture, meant.sources, key=f"{key}/{place}/{digest}"))
            places.append(place)
    grouped: list[list[dict[str, Score]]] = [[] for _ in pictures]
    for place, scores in zip(places, scorer.score(requests), strict=True):
        grouped[place].append(scores)
    return grouped


def with_constraints(scores: Sequence[Sequence[dict[str, Score]]], groups: Sequence[Sequence[Candidate]]) -> list[list[dict[str, Score]]]:
    """The scores with that of the rules beside them."""
    return [
        [found | {CONSTRAINTS: Value(candidate.constraints)} for found, candidate in zip(row, group, strict=True)]
        for row, group in zip(scores, groups, strict=True)
    ]
