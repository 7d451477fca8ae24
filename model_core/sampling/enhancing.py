"""Short requests rewritten by the Prompt Enhancer before anything is drawn: the likeliest answers, checked (R1 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from model_core.data.enhanced_prompt import EnhancedPrompt, enhanced_or_own
from model_core.models.enhancer import PromptEnhancer
from model_core.recipe_enhancer import Enhancer

BATCH_REQUESTS = 32
MAX_NEW_TOKENS = Enhancer().max_new_tokens  # a registered enhancer does not say with how many it was trained


UNREADABLE = "the generator cannot read its prompt, which is too long or holds a mark of the chat"


def enhance(
    enhancer: PromptEnhancer, requests: Sequence[str], *, num_images: Sequence[int], reads: Callable[[str], bool]
) -> list[EnhancedPrompt]:
    """A prompt for each request, in their order; the user's own words, and why, where an answer is not valid or the generator does
    not read it.

    `num_images`: pictures to edit of each request, 0 for a new one. Raises UserError for a request that holds a mark of the chat.
    """
    answers: list[list[int]] = []
    for first in range(0, len(requests), BATCH_REQUESTS):
        batch = slice(first, first + BATCH_REQUESTS)
        answers += enhancer.generate(requests[batch], num_images=num_images[batch], max_new_tokens=MAX_NEW_TOKENS)
    found = [
        enhanced_or_own(request, enhancer.text(answer), count) for request, answer, count in zip(requests, answers, num_images, strict=True)
    ]
    return [
        enhanced if reads(enhanced.prompt) else EnhancedPrompt(prompt=request, fallback=UNREADABLE)
        for request, enhanced in zip(requests, found, strict=True)
    ]
