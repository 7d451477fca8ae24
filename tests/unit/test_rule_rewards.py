"""Rewards by rules against pictures whose content is known, and the texts, gates and sums around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from model_core.data.edits import edit_scene
from model_core.data.keys import keyed_generator
from model_core.data.synthetic import (
    BACKGROUNDS,
    COLORS,
    NUM_WORDINGS,
    PHOTO,
    POSITIONS,
    SHAPES,
    Scene,
    asked_in,
    compose,
    describe,
    held_out_scenes,
    render,
)
from model_core.documents import UserError
from model_core.recipe import Scenes
from model_core.rewards.attribute_check import ATTRIBUTES, COLOR_TEMPERATURE, MEAN, AttributeCheck, palette_share
from model_core.rewards.combined import CombinedScorer
from model_core.rewards.edit_consistency import INSTRUCTION, NO_REGION, EditConsistency, outside_region, similarity
from model_core.rewards.edit_consistency import NAME as CONSISTENCY
from model_core.rewards.face_gate import DRAWN_FACE, NO_FACE, FaceGated, face_gate, open_face_finder
from model_core.rewards.text_accuracy import NO_TEXT, TextAccuracy, asked_text, levenshtein, open_reader, symmetric_cer
from model_core.rewards.verdict import Invalid, RewardUnavailable, Score, ScoreRequest, Value

SCENES = Scenes()
TEXTS = [letter + digit for letter in SCENES.letters for digit in SCENES.digits]
VALUES: dict[str, Sequence[str]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "position": POSITIONS,
    "text": TEXTS,
    "background": tuple(BACKGROUNDS),
}
EVERYTHING_ASKED = 1  # the wording that names the background too
BLANK = Image.new("RGB", (64, 64))


class Fixed:
    """Gives each request the same scores, and counts what it was asked."""

    def __init__(self, **scores: Score) -> None:
        self.names = tuple(scores)
        self._scores = scores
        self.num_asked = 0

    def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
        self.num_asked += len(requests)
        return [dict(self._scores) for _ in requests]


class Raising:
    names = ("broken",)

    def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
        raise ZeroDivisionError("by zero")


def request(image: Image.Image = BLANK, prompt: str = "", **parts: Any) -> ScoreRequest:
    return ScoreRequest(key="k", prompt=prompt, image=image, **parts)


def of_scene(scene: Scene, image: Image.Image, wording: int = EVERYTHING_ASKED) -> ScoreRequest:
    return request(image, describe(scene, wording), notes=scene.to_dict())


def drawn(scene: Scene, index: int) -> Image.Image:
    return render(scene, 64, 7, "rule rewards", index)


def wrong_in(scene: Scene, attribute: str, index: int) -> Scene:
    others = [value for value in VALUES[attribute] if value != getattr(scene, attribute)]
    return replace(scene, **{attribute: others[index % len(others)]})


def value(score: Score) -> float:
    assert isinstance(score, Value), score
    return score.value


SOME_SCENES = held_out_scenes(24, SCENES, seed=3)
CHECK = AttributeCheck(SCENES)


def test_clean_renders_score_high_in_all_that_is_asked() -> None:
    scores = CHECK.score([of_scene(scene, drawn(scene, index)) for index, scene in enumerate(SOME_SCENES)])
    for name in CHECK.names:
        values = [value(score[name]) for score in scores]
        assert min(values) > 0.4, name
        assert np.mean(values) > 0.85, name


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_wrong_attribute_scores_low_in_itself(attribute: str) -> None:
    right, wrong = [], []
    for index, scene in enumerate(SOME_SCENES):
        pictures = drawn(scene, index), drawn(wrong_in(scene, attribute, index), index)
        first, second = CHECK.score([of_scene(scene, picture) for picture in pictures])
        right.append(value(first[f"check_{attribute}"]))
        wrong.append(value(second[f"check_{attribute}"]))
        assert value(second[MEAN]) < value(first[MEAN])
    # one character of a wrong text may be the right one
    assert max(wrong) < (0.55 if attribute == "text" else 0.15)
    assert min(right) > max(wrong)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_each_step_from_a_wrong_to_the_right_picture_raises_the_reward(attribute: str) -> None:
    for index, scene in enumerate(SOME_SCENES[:8]):
        wrong, right = (np.asarray(drawn(shown, index), dtype=float) for shown in (wrong_in(scene, attribute, index), scene))
        blends = [Image.fromarray(((1 - share) * wrong + share * right).round().astype(np.uint8)) for share in np.linspace(0, 1, 17)]
        values = [value(scores[f"check_{attribute}"]) for scores in CHECK.score([of_scene(scene, blend) for blend in blends])]
        steps = np.diff(values)
        assert steps.min() > -0.002, (scene, values)  # levels are whole numbers
        assert values[-1] > values[0] + 0.3


@given(
    start=st.tuples(*[st.floats(0, 255)] * 3),
    asked=st.sampled_from([*COLORS, *BACKGROUNDS]),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(max_examples=200, deadline=None)
def test_colour_is_monotone_on_every_straight_way_to_the_asked_one(
    start: tuple[float, float, float], asked: str, shares: tuple[float, float]
) -> None:
    goal = np.array((COLORS | BACKGROUNDS)[asked])
    first, second = (palette_share(np.array([(1 - share) * np.array(start) + share * goal]), asked) for share in sorted(shares))
    assert second >= first - 1e-9


def test_colour_share_is_the_softmax_of_distances() -> None:
    pixel = np.array([100.0, 120.0, 140.0])
    palette = COLORS | BACKGROUNDS
    likelihoods = {name: np.exp(-np.linalg.norm(pixel - color) / COLOR_TEMPERATURE) for name, color in palette.items()}
    assert palette_share(pixel[None], "blue") == pytest.approx(likelihoods["blue"] / sum(likelihoods.values()))


@pytest.mark.parametrize(
    ("spoilt", "least"),
    [
        (lambda picture: picture.filter(ImageFilter.GaussianBlur(1.0)), 0.94),
        (lambda picture: Image.fromarray(np.pad(np.asarray(picture), ((2, 0), (0, 2), (0, 0)), mode="edge")[:64, 2:]), 0.9),
        (lambda picture: picture.resize((256, 256), Image.Resampling.BICUBIC), 0.98),
    ],
    ids=["blurred", "moved by two pixels", "four times as large"],
)
def test_soft_moved_and_large_pictures_keep_their_scores(spoilt: Any, least: float) -> None:
    pictures = [drawn(scene, index) for index, scene in enumerate(SOME_SCENES)]
    clean, after = (
        np.mean([value(score[MEAN]) for score in CHECK.score([of_scene(*pair) for pair in zip(SOME_SCENES, shown, strict=True)])])
        for shown in (pictures, [spoilt(picture) for picture in pictures])
    )
    assert after > least * clean


def test_an_empty_picture_and_noise_earn_nothing_but_the_background() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for scene in SOME_SCENES:
        empty = Image.new("RGB", (64, 64), BACKGROUNDS[scene.background])
        for picture in (empty, noise):
            (scores,) = CHECK.score([of_scene(scene, picture)])
            assert max(value(scores[f"check_{name}"]) for name in ("shape", "text")) < 0.05
            assert max(value(scores[f"check_{name}"]) for name in ("color", "position")) < 0.3
        (scores,) = CHECK.score([of_scene(scene, empty)])
        assert value(scores["check_background"]) > 0.8


def test_shapes_at_every_place_do_not_win_the_position() -> None:
    scene = Scene("red", "circle", "left", "white", "")
    pixels = [np.asarray(render(replace(scene, position=position), 64, 0)) for position in POSITIONS]
    (scores,) = CHECK.score([of_scene(scene, Image.fromarray(np.min(pixels, axis=0)))])
    assert value(scores["check_position"]) < 0.3


@pytest.mark.parametrize("wording", range(NUM_WORDINGS))
def test_only_what_the_prompt_says_is_scored(wording: int) -> None:
    scene = Scene("red", "circle", "left", "white", "")
    (scores,) = CHECK.score([of_scene(scene, drawn(scene, 0), wording)])
    asked = {name for name in ATTRIBUTES if isinstance(scores[f"check_{name}"], Value)}
    assert asked == {"color", "shape", "position"} | ({"background"} if wording in (1, 2) else set())
    assert scores["check_text"] == Invalid("not asked for")
    assert value(scores[MEAN]) == pytest.approx(np.mean([value(scores[f"check_{name}"]) for name in asked]))


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("A RED circle, on the left.", {"color", "shape", "position"}),
        ("something else", set()),
        ('the text "K7" beside it', {"text"}),
        ("the text K77", set()),
        ("redder circles", set()),
    ],
)
def test_words_of_the_prompt_decide_what_is_asked(prompt: str, asked: set[str]) -> None:
    assert set(asked_in(Scene("red", "circle", "left", "white", "K7"), prompt)) == asked


def test_without_a_plain_scene_all_is_invalid() -> None:
    assert CHECK.score([request(prompt="a red circle on the left")]) == [dict.fromkeys(CHECK.names, Invalid("no plain scene"))]


def test_what_has_no_template_is_invalid_and_left_out_of_the_mean() -> None:
    scene = Scene("red", "circle", "left", PHOTO, "GOLD")
    picture = compose(replace(scene, text=""), Image.new("RGB", (64, 64), (90, 120, 90)), 0)
    (scores,) = CHECK.score([of_scene(scene, picture)])
    assert scores["check_background"] == scores["check_text"] == Invalid("no template for it")
    assert value(scores[MEAN]) > 0.9


@pytest.mark.parametrize("operation", ["attribute", "background", "text", "removal"])
def test_of_an_edit_its_one_change_is_scored(operation: str) -> None:
    scene = Scene("red", "circle", "left", "white", "K7")
    edit = edit_scene(operation, scene, SCENES, keyed_generator(1), 5)
    assert edit is not None
    asked = request(edit.target, edit.instruction, sources=edit.references, notes=edit.notes)
    done, undone = CHECK.score([asked, replace(asked, image=edit.references[0])])
    name = f"check_{edit.notes['change']['attribute']}"
    assert {other for other in CHECK.names if isinstance(done[other], Value)} == {name, MEAN}
    assert value(done[name]) > 0.7
    assert value(undone[name]) < 0.55


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2), ("same", "same", 0)],
)
def test_levenshtein_of_known_pairs(first: str, second: str, distance: int) -> None:
    assert levenshtein(first, second) == levenshtein(second, first) == distance


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_levenshtein_agrees_with_its_recursive_definition(first: str, second: str) -> None:
    def recursive(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        if a[0] == b[0]:
            return recursive(a[1:], b[1:])
        return 1 + min(recursive(a[1:], b), recursive(a, b[1:]), recursive(a[1:], b[1:]))

    assert levenshtein(first, second) == recursive(first, second)


@pytest.mark.parametrize(
    ("read", "asked", "accuracy"),
    [
        ("Hello World", "hello  world", 1.0),
        ("", "A1", 0.0),
        ("A1A1", "A1", 0.5),  # repeated
        ("A1 and more of it", "A1", 2 / 13),  # the text is there, with other text
        ("A", "A1", 0.5),
        ("XYZW", "A1", 0.0),
    ],
)
def test_text_that_is_missing_repeated_or_added_costs(read: str, asked: str, accuracy: float) -> None:
    assert 1 - symmetric_cer(read, asked) == pytest.approx(accuracy)
    (scores,) = TextAccuracy(lambda _picture: read).score([request(prompt=f'a sign that says "{asked}"')])
    assert value(scores["text_accuracy"]) == pytest.approx(accuracy)


def test_the_asked_text_is_the_scenes_the_edits_or_the_quoted_one() -> None:
    scene = Scene("red", "circle", "left", "white", "K7")
    assert asked_text(of_scene(scene, BLANK)) == "K7"
    assert asked_text(request(prompt="a red circle", notes=scene.to_dict())) == ""
    assert asked_text(request(prompt='“Open” above "late"')) == "Open late"
    change = {"attribute": "text", "from": "K7", "to": "B2", "region": "text"}
    assert asked_text(request(prompt="change the text to B2", notes={"change": change})) == "B2"


def test_text_is_invalid_and_not_read_where_none_is_asked_for() -> None:
    def read(_picture: Image.Image) -> str:
        raise AssertionError("was read")

    assert TextAccuracy(read).score([request(prompt="a red circle")]) == [{"text_accuracy": NO_TEXT}]


@pytest.mark.parametrize(
    ("module", "open_it", "package"),
    [("text_accuracy", open_reader, "rapidocr-onnxruntime"), ("face_gate", open_face_finder, "nudenet")],
)
def test_a_package_that_is_not_installed_is_named(module: str, open_it: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"model_core.rewards.{module}.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=f"install it with `uv pip install {package}`"):
        open_it()


@pytest.mark.parametrize(
    ("score", "has_face", "after"),
    [
        (Value(4.0), True, Value(4.0)),
        (Value(4.0), False, NO_FACE),
        (Invalid("torn"), False, Invalid("torn")),
        (Invalid("torn"), True, Invalid("torn")),
    ],
)
def test_a_portrait_is_valid_only_with_a_face(score: Score, has_face: bool, after: Score) -> None:
    assert face_gate(score, has_face=has_face) == after
    gated = FaceGated(Fixed(portrait=score, aesthetics=Value(1.0)), has_face=lambda _picture: has_face)
    assert gated.score([request()]) == [{"portrait": after, "aesthetics": Value(1.0)}]


def test_a_drawn_face_is_taken_from_the_notes() -> None:
    gated = FaceGated(Fixed(portrait=Value(4.0)), has_face=lambda _picture: False)
    assert gated.score([request(notes={DRAWN_FACE: True})]) == [{"portrait": Value(4.0)}]


def edit_request(operation: str, index: int = 5) -> tuple[ScoreRequest, Image.Image]:
    """An edit, asked about with its source as the result; and its target."""
    edit = edit_scene(operation, Scene("red", "circle", "left", "white", "K7"), SCENES, keyed_generator(index), index)
    assert edit is not None
    return request(edit.references[0], edit.instruction, sources=edit.references, notes=edit.notes), edit.target


@pytest.mark.parametrize("operation", ["attribute", "background", "text", "removal"])
@pytest.mark.parametrize("index", range(4))
def test_the_outside_of_an_edit_is_where_source_and_target_are_equal(operation: str, index: int) -> None:
    asked, target = edit_request(operation, index)
    outside = outside_region(asked.notes, size=target.size)
    assert outside is not None
    assert np.abs(np.asarray(target, dtype=int) - np.asarray(asked.sources[0], dtype=int))[outside].max() == 0
    assert outside.mean() > (0.04 if asked.notes["change"]["region"] == "background" else 0.6)


def test_doing_nothing_does_not_win_an_edit() -> None:
    asked, target = edit_request("attribute")
    followed, ignored = EditConsistency(Fixed(**{INSTRUCTION: Value(1.0)})), Fixed(**{INSTRUCTION: Value(0.0)})
    done = followed.score([replace(asked, image=target)])[0][CONSISTENCY]
    nothing = EditConsistency(ignored).score([asked])[0][CONSISTENCY]
    assert done == Value(1.0)
    assert nothing == Value(0.0)


def test_damage_outside_the_edited_region_lowers_consistency_and_damage_inside_does_not() -> None:
    asked, target = edit_request("text")
    scorer = EditConsistency(Fixed(**{INSTRUCTION: Value(0.5)}))

    def consistency(pixels: np.ndarray) -> float:
        return value(scorer.score([replace(asked, image=Image.fromarray(pixels))])[0][CONSISTENCY])

    outside = outside_region(asked.notes, size=target.size)
    assert outside is not None
    inside_spoilt, outside_spoilt = np.array(target), np.array(target)
    inside_spoilt[~outside] = 0
    outside_spoilt[outside] = 128
    assert consistency(np.array(target)) == consistency(inside_spoilt) == 0.5
    assert consistency(outside_spoilt) < 0.1


def test_similarity_falls_by_e_at_sixteen_levels() -> None:
    source, result = Image.new("RGB", (8, 8), (100, 100, 100)), Image.new("RGB", (16, 16), (116, 84, 116))
    assert similarity(result, source, np.ones((8, 8), dtype=bool)) == pytest.approx(np.exp(-1))


@pytest.mark.parametrize("notes", [{}, {"change": {"attribute": "style", "to": "sepia", "region": "all"}, "source": None, "target": None}])
def test_consistency_is_invalid_where_the_region_is_unknown(notes: dict[str, Any]) -> None:
    scorer = EditConsistency(Fixed(**{INSTRUCTION: Value(1.0)}))
    assert scorer.score([request(sources=[BLANK], notes=notes)])[0][CONSISTENCY] == NO_REGION


def test_consistency_is_invalid_where_the_instructions_score_is() -> None:
    scorer = EditConsistency(Fixed(**{INSTRUCTION: Invalid("torn")}))
    assert scorer.score([edit_request("text")[0]])[0][CONSISTENCY] == Invalid("instruction_following: torn")


def test_several_scorers_are_one() -> None:
    scorer = CombinedScorer([Fixed(a=Value(1.0), b=Invalid("x")), Fixed(c=Value(3.0))])
    assert scorer.names == ("a", "b", "c")
    assert scorer.score([request(), request()]) == [{"a": Value(1.0), "b": Invalid("x"), "c": Value(3.0)}] * 2


def test_a_scorer_of_no_wanted_reward_is_not_asked() -> None:
    unwanted = Fixed(a=Value(1.0))
    scorer = CombinedScorer([unwanted, Fixed(c=Value(3.0), d=Value(4.0))], rewards=["d"])
    assert scorer.score([request()]) == [{"d": Value(4.0)}]
    assert unwanted.num_asked == 0


def test_one_reward_from_two_scorers_is_refused() -> None:
    with pytest.raises(UserError, match="found a more than once"):
        CombinedScorer([Fixed(a=Value(1.0), b=Value(1.0)), Fixed(a=Value(2.0))])


def test_a_reward_that_nobody_gives_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match="found taste; allowed are a, b"):
        CombinedScorer([Fixed(a=Value(1.0), b=Value(1.0))], rewards=["a", "taste"])


def test_an_exception_of_one_scorer_is_told_and_no_score_stands_for_it() -> None:
    with pytest.raises(RewardUnavailable, match="broken: ZeroDivisionError: by zero"):
        CombinedScorer([Fixed(a=Value(1.0)), Raising()]).score([request()])


def test_a_number_that_is_none_becomes_invalid() -> None:
    scorer = CombinedScorer([Fixed(a=Value(float("nan")), b=Value(1.0, float("inf")), c=Value(1.0))])
    assert scorer.score([request()]) == [{"a": Invalid("not finite"), "b": Invalid("not finite"), "c": Value(1.0)}]


def test_another_number_of_answers_is_no_answer() -> None:
    class Short(Fixed):
        def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
            return super().score(requests)[1:]

    with pytest.raises(RewardUnavailable, match="found 1 answers to 2 requests"):
        CombinedScorer([Short(a=Value(1.0))]).score([request(), request()])


@pytest.mark.parametrize("scores", [{}, {"b": Value(1.0)}, {"a": Value(1.0), "b": Value(1.0)}])
def test_other_rewards_than_promised_are_no_answer(scores: dict[str, Score]) -> None:
    class Other(Fixed):
        def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
            return [scores for _ in requests]

    with pytest.raises(RewardUnavailable, match="a: found the rewards .*; allowed are a"):
        CombinedScorer([Other(a=Value(1.0))]).score([request()])
