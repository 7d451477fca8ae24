"""Filters against closed forms and brute force; perceptual hashes against scipy's DCT."""

import sys
import types
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.fft import dctn

from model_core.data.filters import (
    OPERATORS,
    UNIQUE,
    Look,
    alike,
    apply,
    check_filters,
    duplicate_bits,
    entropy_bits,
    open_nsfw_detector,
    score_row,
    sharpness,
)
from model_core.data.phash import distance, perceptual_hash
from model_core.data.shards import make_row
from model_core.data.synthetic import render, training_scenes
from model_core.documents import UserError
from model_core.recipe import Recipe, Scenes, Thresholds


def photo(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Smooth random colours: something like a photograph."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def test_entropy_of_k_equally_frequent_levels_is_log2_k():
    for levels in (1, 2, 16, 256):
        values = np.tile(np.arange(levels) * (256 // levels), 256 // levels * 4).astype(np.uint8)
        assert entropy_bits(Image.fromarray(values.reshape(-1, 32))) == pytest.approx(np.log2(levels))


def test_sharpness_of_a_plane_is_zero_and_of_a_checkerboard_is_the_closed_form():
    ramp = np.tile(np.arange(32, dtype=np.uint8) * 4, (32, 1))
    assert sharpness(Image.fromarray(ramp)) == 0
    board = (np.indices((32, 32)).sum(0) % 2 * 10).astype(np.uint8)
    assert sharpness(Image.fromarray(board)) == pytest.approx(40.0**2)  # the Laplacian is +-40, its mean 0
    assert sharpness(Image.new("L", (2, 9))) == 0


def test_perceptual_hash_is_that_of_an_independent_dct():
    for seed in range(10):
        image = photo(seed)
        grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), dtype=float)
        low = dctn(grey, norm=None)[:8, :8].ravel()
        wanted = "".join("1" if value > np.median(low[1:]) else "0" for value in low)
        assert distance(perceptual_hash(image), int(wanted, 2)) <= 2  # near the median rounding decides


def test_hashes_of_one_picture_stored_otherwise_are_near_and_of_others_far():
    for seed in range(10):
        image = photo(seed)
        smaller = image.resize((48, 40), Image.Resampling.LANCZOS)
        assert distance(perceptual_hash(image), perceptual_hash(smaller)) <= 8
        assert distance(perceptual_hash(image), perceptual_hash(photo(seed + 100))) > 12


@pytest.mark.parametrize("radius", [0, 1, 3, 8])
def test_duplicates_are_those_of_a_brute_force(radius):
    generator = np.random.default_rng(radius)
    base = generator.integers(0, 2**63, 6, dtype=np.uint64)
    looks = []
    for _ in range(120):
        value = int(base[generator.integers(6)])
        for bit in generator.integers(0, 64, generator.integers(0, 6)):
            value ^= 1 << int(bit)
        thumbnails = np.full((1, 16, 16, 3), 100 * generator.integers(0, 2), dtype=np.uint8)
        looks.append(Look(("image", "", 1), value, thumbnails))
    candidates = generator.random(120) < 0.9
    unique: list[int] = []
    wanted = np.full(120, UNIQUE)
    for index, look in enumerate(looks):
        if not candidates[index]:
            continue
        near = [distance(look.phash, looks[other].phash) for other in unique if alike(look.thumbnails, looks[other].thumbnails)]
        if near and min(near) <= radius:
            wanted[index] = min(near)
        else:
            unique.append(index)
    assert np.array_equal(duplicate_bits(looks, candidates, radius=radius), wanted)
    assert (wanted < UNIQUE).sum() > 5


def test_scenes_that_share_a_hash_but_not_a_text_are_no_duplicates():
    scenes = list(training_scenes(Scenes(num_images=300), seed=0))
    rows = [make_row(render(scene, 64, 0), kind="image") for scene in scenes]
    looks = [score_row(row, seed=0, nsfw=None)[1] for row in rows]
    bits = duplicate_bits(looks, np.ones(300, dtype=bool), radius=0)
    assert len({row.phash for row in rows}) < 297
    dropped = [scenes[index] for index in np.flatnonzero(bits <= 0)]
    assert all(scenes.count(scene) > 1 for scene in dropped)


def test_a_picture_resaved_is_a_duplicate_within_its_kind_alone(tmp_path):
    first = make_row(photo(1), kind="image", caption="a")
    photo(1).save(tmp_path / "x.jpg", quality=80)
    again = make_row(Image.open(tmp_path / "x.jpg").convert("RGB"), kind="image", caption="b")
    rows = [first, again, replace(first, kind="text_image")]
    looks = [score_row(row, seed=0, nsfw=None)[1] for row in rows]
    assert list(duplicate_bits(looks, np.ones(3, dtype=bool), radius=6) < UNIQUE) == [False, True, False]


def test_edits_of_one_picture_with_other_instructions_are_no_duplicates():
    target, source = photo(1), photo(2)
    rows = [
        make_row(target, kind="edit", references=[source], instruction=said) for said in ("make it blue", "paint it blue", "make it blue")
    ]
    looks = [score_row(row, seed=0, nsfw=None)[1] for row in rows]
    assert list(duplicate_bits(looks, np.ones(3, dtype=bool), radius=0) < UNIQUE) == [False, False, True]


def scored(rows, **known):
    pairs = [score_row(row, seed=0, nsfw=None, **known) for row in rows]
    return {name: np.array([scores[name] for scores, _ in pairs]) for name in pairs[0][0]}, [look for _, look in pairs]


def test_the_funnel_names_every_operator_in_the_published_order_and_adds_up():
    flat = Image.new("RGB", (64, 64), "red")
    rows = [
        make_row(photo(1), kind="image", caption="one two"),
        replace(make_row(photo(2), kind="image"), image=b"broken"),
        make_row(photo(3, (15, 40)), kind="image"),
        make_row(photo(1), kind="image", caption="the same"),
        make_row(flat, kind="image"),
        make_row(photo(4), kind="image", caption="one two three four"),
    ]
    scores, looks = scored(rows)
    kept, funnel = apply(scores, Thresholds(min_side_px=16, min_entropy_bits=1.0, max_caption_words=3), looks)
    assert list(kept) == [True, False, False, False, False, False]
    order = ["broken", "resolution", "duplicates", "nsfw", "entropy", "sharpness", "caption_words", "keep_share"]
    assert [entry["operator"] for entry in funnel] == order
    assert [entry["in"] - entry["out"] for entry in funnel] == [1, 1, 1, 0, 1, 0, 1, 0]
    assert [entry["in"] for entry in funnel[1:]] == [entry["out"] for entry in funnel[:-1]]


def test_a_dropped_row_is_nobodys_original():
    small = make_row(photo(1, (40, 15)), kind="image")
    same_look = replace(make_row(photo(1, (40, 15)), kind="image", caption="large enough"), width=400, height=150)
    scores, looks = scored([small, same_look])
    kept, _ = apply(scores, Thresholds(min_side_px=16), looks)
    assert list(kept) == [False, True]


LIMITS = [
    ({"min_entropy_bits": 3.0}, "entropy_bits", [2.0, 3.0, 4.0], [False, True, True]),
    ({"max_entropy_bits": 3.0}, "entropy_bits", [2.0, 3.0, 4.0], [True, True, False]),
    ({"min_sharpness": 3.0}, "sharpness", [2.0, 3.0, 4.0], [False, True, True]),
    ({"max_nsfw": 0.5}, "nsfw", [0.2, 0.5, 0.8], [True, True, False]),
    ({"max_caption_words": 3}, "caption_words", [2.0, 3.0, 4.0], [True, True, False]),
    ({"min_side_px": 3}, "side_px", [2.0, 3.0, 4.0], [False, True, True]),
    ({"keep_share": 0.5}, "draw", [0.2, 0.5, 0.8], [True, False, False]),
    ({"dedup_distance": 3}, "duplicate_bits", [2.0, 3.0, 4.0], [False, False, True]),
    ({"dedup_distance": None}, "duplicate_bits", [0.0, 3.0, 65.0], [True, True, True]),
]


@pytest.mark.parametrize(("limits", "column", "values", "kept"), LIMITS, ids=[str(limit[0]) for limit in LIMITS])
def test_thresholds_decide_on_scores(limits, column, values, kept):
    (operator,) = [operator for operator in OPERATORS if operator.score == column]
    assert list(operator.keep(np.array(values), Thresholds(**limits))) == kept


def test_without_thresholds_unscored_rows_pass():
    for operator, column in product(OPERATORS, ("nsfw", "entropy_bits", "sharpness")):
        if operator.score == column:
            assert operator.keep(np.array([np.nan]), Thresholds()).all()


def test_a_smaller_share_is_drawn_from_a_larger_one():
    draws = np.array([score_row(make_row(photo(seed), kind="image"), seed=0, nsfw=None)[0]["draw"] for seed in range(40)])
    (operator,) = [operator for operator in OPERATORS if operator.name == "keep_share"]
    half, most = (operator.keep(draws, Thresholds(keep_share=share)) for share in (0.5, 0.8))
    assert 0 < half.sum() < most.sum() < 40
    assert not (half & ~most).any()


def test_nsfw_without_its_detector_is_refused_before_work(monkeypatch):
    monkeypatch.setattr("model_core.data.filters.find_spec", lambda name: None)
    stages = {"S1": {"filter": {"max_nsfw": 0.4}}}
    with pytest.raises(UserError, match=r"mmdit.stages.S1.filter.max_nsfw: found 0.4, but the detector nudenet is not installed"):
        check_filters(Recipe.model_validate({"name": "x", "mmdit": {"stages": stages}}))
    check_filters(Recipe.model_validate({"name": "x", "mmdit": {"stages": {"S1": {}}}}))


def test_the_nsfw_score_is_that_of_the_most_explicit_part(monkeypatch):
    class FakeDetector:
        def detect(self, pixels: np.ndarray) -> list[dict[str, object]]:
            assert tuple(pixels[0, 0]) == (3, 2, 1)  # BGR
            return [
                {"class": "FACE_FEMALE", "score": 0.9},
                {"class": "BUTTOCKS_EXPOSED", "score": 0.3},
                {"class": "ANUS_EXPOSED", "score": 0.6},
            ]

    monkeypatch.setitem(sys.modules, "nudenet", types.SimpleNamespace(NudeDetector=FakeDetector))
    picture = Image.new("RGB", (20, 20), (1, 2, 3))
    ImageDraw.Draw(picture).point((5, 5), fill="white")
    assert open_nsfw_detector()(picture) == 0.6
