"""Pairs of known order: what the labels claim is read back from the pictures by means that did not make them."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from model_core.data.keys import keyed_generator
from model_core.data.known_pairs import KnownPair, Shown, preference_of
from model_core.data.preferences import Preference, read_preferences, write_preferences
from model_core.data.scene_changes import changed
from model_core.data.shards import decode_image
from model_core.data.synthetic import BACKGROUNDS, COLORS, POSITIONS, SHAPES, Scene, is_held_out, scene_from_dict, training_scene
from model_core.data.synthetic_preferences import synthetic_preferences
from model_core.evaluation.judge import Judge, Reading
from model_core.recipe import DIMENSIONS, Preferences, Scenes

SCENES = Scenes()
NUM = 64


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Preference]]:
    config = Preferences(num_pairs=NUM)
    return {name: list(synthetic_preferences(config, SCENES, seed=0, dimension=name)) for name in DIMENSIONS}


@pytest.fixture(scope="module")
def readings(rows: dict[str, list[Preference]]) -> list[tuple[Reading, Reading]]:
    """What the judge sees in a and b of alignment's pairs."""
    judge = Judge(SCENES)
    return [(judge.read(a), judge.read(b)) for a, b in (row.pictures() for row in rows["alignment"])]


def ordered(row: Preference) -> tuple[Image.Image, Image.Image]:
    """The better picture first."""
    a, b = row.pictures()
    return (b, a) if row.label == "b" else (a, b)


def scores(row: Preference) -> tuple[float, float]:
    assert row.score_a is not None
    assert row.score_b is not None
    return row.score_a, row.score_b


def all_scenes(value: object) -> list[dict[str, str]]:
    """Every mapping in the notes that describes a scene."""
    if not isinstance(value, dict):
        return []
    found = [value] if "shape" in value and "position" in value else []
    return found + [scene for part in value.values() for scene in all_scenes(part)]


def test_the_order_of_scores_is_the_label_and_both_lie_between_1_and_5(rows):
    for row in (row for found in rows.values() for row in found):
        a, b = scores(row)
        assert row.label == ("a" if a > b else "b" if b > a else "tie")
        assert 1 <= min(a, b) <= max(a, b) <= 5


def test_sides_are_balanced_and_ties_as_many_as_asked_for(rows):
    labels = Counter(row.label for found in rows.values() for row in found)
    assert labels["tie"] / sum(labels.values()) == pytest.approx(0.1, abs=0.05)
    assert labels["a"] / (labels["a"] + labels["b"]) == pytest.approx(0.5, abs=0.09)  # 3 standard deviations of 290 coins


def test_no_note_names_a_held_out_scene_and_the_judge_reads_none(rows, readings):
    scenes = [scene_from_dict(scene) for found in rows.values() for row in found for scene in all_scenes(row.notes)]
    assert len(scenes) > 200
    assert not [scene for scene in scenes if is_held_out(scene, SCENES.held_out_share)]
    read = [Scene(each.color, each.shape, each.position, each.background, each.text) for pair in readings for each in pair]
    assert not [scene for scene in read if is_held_out(scene, SCENES.held_out_share)]


def test_the_judge_finds_as_many_attributes_wrong_as_the_score_of_alignment_says(rows, readings):
    agree = []
    for row, pair in zip(rows["alignment"], readings, strict=True):
        asked = row.notes["scene"]
        names = ["color", "shape", "position", *(["text"] if asked["text"] else [])]
        if any(f" {asked['background']} {word}" in row.prompt for word in ("picture", "background")):
            names.append("background")
        for reading, score in zip(pair, scores(row), strict=True):
            wrong = sum(getattr(reading, name) != asked[name] for name in names)
            agree.append({0: 5, 1: 3, 2: 2, 3: 1}[min(wrong, 3)] == score)
    assert np.mean(agree) > 0.98


def test_pictures_of_known_order_can_be_told_apart(rows):
    """Else the label would be noise; ties may differ as they like."""
    for row in (row for found in rows.values() for row in found if row.label != "tie"):
        first, second = (np.asarray(picture, dtype=float) for picture in row.pictures())
        assert np.sqrt(np.mean((first - second) ** 2)) > 1


def test_what_was_asked_is_read_in_the_better_result_and_not_in_the_worse(rows):
    judge, results = Judge(SCENES), []
    for row in rows["instruction_following"]:
        attribute = row.notes["attribute"]
        if attribute in ("style", "damage"):
            continue
        done = [getattr(judge.read(picture), attribute) == row.notes["target"][attribute] for picture in ordered(row)]
        results.append(done == ([True, True] if row.label == "tie" else [True, False]))
    assert len(results) > 25
    assert np.mean(results) > 0.95


def test_the_better_result_of_visual_consistency_leaves_more_of_the_rest_as_it_was(rows):
    judge, num = Judge(SCENES), 0
    for row in rows["visual_consistency"]:
        if row.notes["attribute"] in ("style", "damage") or row.label == "tie" or not row.reason.startswith("other_"):
            continue
        source = judge.read(decode_image(row.sources[0]))
        names = [name for name in ("color", "shape", "position", "background", "text") if name != row.notes["attribute"]]
        kept = [sum(getattr(judge.read(picture), name) == getattr(source, name) for name in names) for picture in ordered(row)]
        assert kept[0] > kept[1]
        num += 1
    assert num > 8


def test_the_source_of_an_edit_is_what_its_notes_say(rows):
    judge = Judge(SCENES)
    for row in rows["visual_consistency"]:
        if row.notes["attribute"] != "damage":
            reading = judge.read(decode_image(row.sources[0]))
            assert {name: getattr(reading, name) for name in ("color", "shape", "position")}.items() <= row.notes["source"].items()


def test_no_prompt_and_no_source_is_in_two_splits_of_any_dimension(rows):
    splits = defaultdict(set)
    for row in (row for found in rows.values() for row in found):
        splits["prompt", row.prompt].add(row.split)
        for source in row.sources:
            splits["source", source].add(row.split)
    assert all(len(found) == 1 for found in splits.values())
    counts = Counter(row.split for found in rows.values() for row in found)
    assert counts["test"] / (5 * NUM) == pytest.approx(0.1, abs=0.05)
    assert counts["validation"] / (5 * NUM) == pytest.approx(0.1, abs=0.05)


def test_categories_and_sources_are_of_the_dimension(rows):
    for name, found in rows.items():
        edits = name in ("instruction_following", "visual_consistency")
        allowed = {"edit"} if edits else {"portrait"} if name == "portrait" else {"scene", "text", "portrait"}
        assert {row.category for row in found} <= allowed
        assert all(bool(row.sources) == edits for row in found)
        assert all(bool(row.notes["scene"]["text"]) == (row.category == "text") for row in found if "scene" in row.notes)


def test_one_seed_gives_the_same_pairs_and_another_seed_others(rows):
    config = Preferences(num_pairs=6)
    for name in DIMENSIONS:
        assert list(synthetic_preferences(config, SCENES, seed=0, dimension=name)) == rows[name][:6]
        others = {row.pair_id for row in synthetic_preferences(config, SCENES, seed=1, dimension=name)}
        assert not others & {row.pair_id for row in rows[name]}


def test_the_side_is_drawn_by_what_is_shown_and_everything_goes_with_it():
    shown = {
        color: Shown(picture=Image.new("RGB", (4, 4), color), score=score, notes={"is": color})
        for color, score in (("red", 5.0), ("blue", 2.0))
    }
    pair = KnownPair(prompt="p", category="scene", split="train", better=shown["red"], worse=shown["blue"], reason="x")
    one = preference_of(pair, dimension="alignment", seed=0)
    mirrored = preference_of(replace(pair, better=shown["blue"], worse=shown["red"]), dimension="alignment", seed=0)
    assert one.pair_id == mirrored.pair_id
    sides = {preference_of(pair, dimension="alignment", seed=seed).label for seed in range(20)}
    assert sides == {"a", "b"}
    for seed in range(8):
        row = preference_of(pair, dimension="alignment", seed=seed)
        pictures = dict(zip("ab", row.pictures(), strict=True))
        for side, score in (("a", row.score_a), ("b", row.score_b)):
            color = row.notes[side]["is"]
            assert pictures[side].getpixel((0, 0)) == ((255, 0, 0) if color == "red" else (0, 0, 255))
            assert score == shown[color].score
            assert (row.label == side) == (color == "red")


def test_pairs_come_back_from_parquet_as_they_were(rows, tmp_path):
    for name, found in rows.items():
        assert write_preferences(tmp_path / "p.parquet", found[:4]) == 4
        again = list(read_preferences(tmp_path / "p.parquet", dimension=name))
        assert [replace(row, sources=list(row.sources)) for row in found[:4]] == again


def test_a_longer_list_of_changes_keeps_those_of_a_shorter_one():
    free = SCENES.model_copy(update={"held_out_share": 1e-9})
    names = ["color", "text", "shape", "background", "position"]
    for index in range(20):
        scene = training_scene(free, index)
        steps = [changed(scene, names[:num], free, keyed_generator("wrong", index)) for num in range(6)]
        for before, after, name in zip(steps[:-1], steps[1:], names, strict=True):
            assert before is not None
            assert after is not None
            assert replace(after, **{name: getattr(before, name)}) == before
            assert getattr(after, name) != getattr(before, name)
        last = steps[-1]
        assert last is not None
        assert last.color in COLORS
        assert last.shape in SHAPES
        assert last.position in POSITIONS
        assert last.background in BACKGROUNDS
