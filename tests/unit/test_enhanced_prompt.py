"""Answers of the Prompt Enhancer: what is read, what is refused and why, and the user's own words where it is refused."""

from __future__ import annotations

import pytest

from model_core.data.enhanced_prompt import (
    EnhancedPrompt,
    answer_text,
    aspect_ratio_of,
    constraint_problems,
    enhanced_or_own,
    parse_answer,
)

THOUGHTS = "<think>\ncolor: crimson -> red\n</think>\n\n"
PICTURE = EnhancedPrompt(prompt="a red circle", aspect_ratio="16:9", thoughts=("color: crimson -> red",))
EDIT = EnhancedPrompt(prompt="make the sign say “é”\\", follow_image=2)


@pytest.mark.parametrize(("said", "num_images"), [(PICTURE, 0), (EDIT, 2)])
def test_an_answer_is_read_as_it_was_said(said: EnhancedPrompt, num_images: int):
    assert parse_answer(answer_text(said), num_images) == said


def test_the_form_of_an_answer():
    assert answer_text(PICTURE) == THOUGHTS + '{"prompt": "a red circle", "aspect_ratio": "16:9"}'
    assert answer_text(EDIT).startswith("<think>\n\n</think>\n\n{")


@pytest.mark.parametrize(
    ("answer", "num_images", "reason"),
    [
        ('{"prompt": "a", "aspect_ratio": "1:1"}', 0, "not <think>"),
        (THOUGHTS + "a red circle", 0, "not <think>"),
        (THOUGHTS + '{"prompt": "a", "aspect_ratio": "1:1"} and more', 0, "not <think>"),
        (THOUGHTS + '{"prompt": "a", aspect_ratio}', 0, "Invalid JSON"),
        (THOUGHTS + '{"prompt": "a"}', 0, "aspect_ratio: Field required"),
        (THOUGHTS + '{"prompt": "a", "aspect_ratio": "1:1", "seed": 1}', 0, "seed: Extra inputs"),
        (THOUGHTS + '{"prompt": 1, "aspect_ratio": "1:1"}', 0, "prompt: Input should be a valid string"),
        (THOUGHTS + '{"prompt": " ", "aspect_ratio": "1:1"}', 0, "prompt: it is empty"),
        (THOUGHTS + '{"prompt": "a", "aspect_ratio": "0:1"}', 0, "aspect_ratio: String should match"),
        (THOUGHTS + '{"prompt": "a", "aspect_ratio": "1:1\\n"}', 0, "aspect_ratio: String should match"),
        (THOUGHTS + '{"prompt": "a", "aspect_ratio": "33:1"}', 0, "two numbers up to 32"),
        (THOUGHTS + '{"prompt": "a", "follow_image": 1}', 0, "aspect_ratio: Field required"),
        (THOUGHTS + '{"prompt": "a", "aspect_ratio": "1:1"}', 1, "follow_image: Field required"),
        (THOUGHTS + '{"prompt": "a", "follow_image": "1"}', 1, "follow_image: Input should be a valid integer"),
        (THOUGHTS + '{"prompt": "a", "follow_image": true}', 1, "follow_image: Input should be a valid integer"),
        (THOUGHTS + '{"prompt": "a", "follow_image": 3}', 2, "allowed is 1 to 2"),
        (THOUGHTS + '{"prompt": "a", "follow_image": 0}', 2, "greater than or equal to 1"),
    ],
)
def test_an_answer_that_breaks_the_schema_is_refused_and_replaced(answer: str, num_images: int, reason: str):
    with pytest.raises(ValueError, match=reason):
        parse_answer(answer, num_images)
    own = enhanced_or_own("my words", answer, num_images)
    assert own.prompt == "my words"
    assert own.follow_image == (1 if num_images else None)
    assert reason.split(": ")[-1].strip() in own.fallback


@pytest.mark.parametrize(
    ("request_", "prompt", "problem"),
    [
        ('a disc with "K7"', "a circle with the text K7", None),
        ('a disc with "K7"', "a circle with the text K70", "the text 'K7' is not in the prompt"),
        ('a disc with "K7"', "a circle with the text k7", "the text 'K7' is not in the prompt"),
        ('“One” and "Two"', 'a page that says "One" first', "the text 'Two' is not in the prompt"),
        ('a sign with "C++ (new)"', 'a sign with "C++ (new)" on it', None),
        ("a red cat", "一只红色的猫在窗边", "the request is in en, the prompt in zh"),
        ("一只猫", "一只红色的猫在窗边", None),
        ('a sign with "营业时间从早到晚"', "a sign with the text 营业时间从早到晚", None),
        ("a disc in the middle of a very long road", "a disc", "the prompt has 6 signs; allowed are 20 to 4000"),
        ("a disc", "a circle " * 500, "the prompt has 4500 signs"),
        ("a disc", "a circle\non it", "the prompt has control signs"),
    ],
)
def test_the_rules_that_a_prompt_keeps(request_: str, prompt: str, problem: str | None):
    found = constraint_problems(request_, EnhancedPrompt(prompt=prompt, aspect_ratio="1:1"))
    assert [line[: len(problem)] for line in found] == [problem] if problem else not found
    taken = enhanced_or_own(request_, answer_text(EnhancedPrompt(prompt=prompt, aspect_ratio="1:1")), 0)
    assert (taken.prompt, bool(taken.fallback)) == ((request_, True) if problem else (prompt, False))


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 64), "1:1"), ((1920, 1080), "16:9"), ((1000, 1450), "2:3"), ((100, 900), "1:2"), ((1021, 768), "4:3")]
)
def test_a_size_has_the_nearest_ratio(size: tuple[int, int], expected: str):
    assert aspect_ratio_of(*size) == expected
