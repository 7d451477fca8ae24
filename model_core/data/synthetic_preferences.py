"""Preference pairs whose order is known because of how the pictures were made: no person, and no model, has to judge them.

aesthetics: one picture with a corruption of two severities. alignment: a prompt with a picture of it and one in which named
attributes are wrong. portrait: one portrait with fewer and more faults of anatomy. The two dimensions of edits are in
`edit_preferences`. Only training scenes are drawn; test prompts and test sources are in no other split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from model_core.data.buckets import fit
from model_core.data.corruptions import AESTHETIC, BEST_SCORE, MAX_SEVERITY, corrupt, rms_difference, score_of
from model_core.data.edit_preferences import edit_pair
from model_core.data.edits import crop_of
from model_core.data.keys import keyed_generator, keyed_uniform, one_of
from model_core.data.known_pairs import KnownPair, Shown, preference_of, scene_split, split_of
from model_core.data.portraits import NUM_WORDINGS as NUM_PORTRAIT_WORDINGS
from model_core.data.portraits import describe_portrait, fault_pairs, random_portrait, render_portrait
from model_core.data.preferences import Preference, Split
from model_core.data.scene_changes import MIN_DIFFERENCE, NAMED_ALWAYS, changed, score_of_wrong
from model_core.data.synthetic import NUM_WORDINGS, describe, render, training_scene
from model_core.documents import UserError
from model_core.recipe import Dimension, Preferences, Scenes

PORTRAIT_SHARE = 0.2  # of aesthetics' pairs of drawn pictures
BACKGROUND_WORDINGS = (1, 2)  # of the captions of a scene, those that name its background
NUM_WRONG = (*((0, 1),) * 6, (0, 2), (1, 2), (1, 2), (0, 3), (2, 3))  # attributes wrong in the better and the worse picture
OTHER_PICTURE_SCORE = 1.0
DRAWS_A_SUBJECT = 200  # of edits of one source, before another source is taken
MAX_DRAWS = 2000


@dataclass(frozen=True)
class Photo:
    """A picture that nobody can draw again, with its caption; sides are multiples of 16 px. One caption has one split."""

    picture: Image.Image
    caption: str
    split: Split


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What a pair shows: `draw` gives pictures of it that are equally good, one a key."""

    prompt: str
    category: str
    split: Split
    draw: Callable[[str], Image.Image]
    notes: dict[str, Any]


def synthetic_preferences(
    config: Preferences, scenes: Scenes, *, seed: int, dimension: Dimension, photos: Sequence[Photo] = (), photo_share: float = 0.0
) -> Iterator[Preference]:
    """`config.num_pairs` pairs of one dimension, of which `photo_share` show photographs (portraits are all drawn).

    Raises UserError when the scenes' settings leave no pair.
    """
    for pair in known_pairs(config, scenes, seed=seed, dimension=dimension, photos=photos, photo_share=photo_share):
        yield preference_of(pair, dimension=dimension, seed=seed)


def known_pairs(
    config: Preferences, scenes: Scenes, *, seed: int, dimension: Dimension, photos: Sequence[Photo] = (), photo_share: float = 0.0
) -> Iterator[KnownPair]:
    """The pairs of `synthetic_preferences` as pictures, before one of them is a and the other b."""
    for index in range(config.num_pairs):
        yield _pair(config, scenes, dimension, photos, photo_share, (seed, "preference", dimension, index))


def _pair(
    config: Preferences, scenes: Scenes, dimension: Dimension, photos: Sequence[Photo], photo_share: float, key: tuple[object, ...]
) -> KnownPair:
    tie = keyed_uniform(*key, "tie") < config.tie_share
    of_photo = bool(photos) and keyed_uniform(*key, "photo") < photo_share
    for attempt in range(MAX_DRAWS):
        attempt_key = (*key, attempt)
        generator = keyed_generator(*attempt_key)
        subject_key = (*key, attempt // DRAWS_A_SUBJECT)
        photo = one_of(photos, keyed_generator(*subject_key, "photo")) if of_photo else None
        if dimension == "portrait":
            pair: KnownPair | None = _portrait_pair(config, scenes, generator, attempt_key, tie=tie)
        elif dimension == "aesthetics":
            pair = _aesthetics_pair(_subject(config, scenes, photo, generator, attempt_key), generator, attempt_key, tie=tie)
        elif dimension == "alignment" and photo is not None:
            pair = _photo_alignment_pair(photo, photos, generator, attempt_key, tie=tie)
        elif dimension == "alignment":
            pair = _alignment_pair(config, scenes, generator, attempt_key, tie=tie)
        else:
            source = (_crop(photo, subject_key), photo.split) if photo else training_scene(scenes, *subject_key, "scene")
            pair = edit_pair(config, scenes, generator, attempt_key, dimension=dimension, source=source, tie=tie)
        if pair is not None:
            return pair
    raise UserError(f"preferences: found no pair for {dimension} in {MAX_DRAWS} draws; allowed are more scenes, texts or photographs")


def _subject(config: Preferences, scenes: Scenes, photo: Photo | None, generator: np.random.Generator, key: tuple[object, ...]) -> _Subject:
    if photo is not None:
        return _photo_subject(photo, key)
    return (_portrait_subject if generator.random() < PORTRAIT_SHARE else _scene_subject)(config, scenes, generator, key)


def _scene_subject(config: Preferences, scenes: Scenes, generator: np.random.Generator, key: tuple[object, ...]) -> _Subject:
    scene = training_scene(scenes, *key, "scene")
    return _Subject(
        prompt=describe(scene, int(generator.integers(NUM_WORDINGS))),
        category="text" if scene.text else "scene",
        split=scene_split(config, scene),
        draw=lambda take: render(scene, scenes.size_px, *key, take),
        notes={"scene": scene.to_dict()},
    )


def _portrait_subject(config: Preferences, scenes: Scenes, generator: np.random.Generator, key: tuple[object, ...]) -> _Subject:
    portrait = random_portrait(*key)
    return _Subject(
        prompt=describe_portrait(portrait, int(generator.integers(NUM_PORTRAIT_WORDINGS))),
        category="portrait",
        split=split_of(config, "portrait", describe_portrait(portrait, 0)),
        draw=lambda take: render_portrait(portrait, scenes.size_px, {}, *key, take),
        notes={"portrait": portrait.to_dict()},
    )


def _photo_subject(photo: Photo, key: tuple[object, ...]) -> _Subject:
    return _Subject(
        prompt=photo.caption,
        category="scene",
        split=photo.split,
        draw=lambda take: _crop(photo, (*key, take)),
        notes={},
    )


def _aesthetics_pair(subject: _Subject, generator: np.random.Generator, key: tuple[object, ...], *, tie: bool) -> KnownPair | None:
    """One picture with two severities of a corruption; equal ones are two pictures of one subject with the same severity."""
    clean, kind = subject.draw("one"), one_of(AESTHETIC, generator)
    if tie:
        mild = severe = int(generator.integers(MAX_SEVERITY + 1))
        better, worse = (corrupt(picture, kind, mild, *key) for picture in (clean, subject.draw("two")))
    else:
        mild = 0 if generator.random() < 0.5 else int(generator.integers(1, MAX_SEVERITY))
        severe = int(generator.integers(mild + 1, MAX_SEVERITY + 1))
        better, worse = (corrupt(clean, kind, severity, *key) for severity in (mild, severe))
        if rms_difference(clean, worse) < rms_difference(clean, better) + MIN_DIFFERENCE:
            return None  # such as more saturation where all is saturated
    return KnownPair(
        prompt=subject.prompt,
        category=subject.category,
        split=subject.split,
        better=Shown(picture=better, score=score_of(mild), notes={"corruption": kind, "severity": mild}),
        worse=Shown(picture=worse, score=score_of(severe), notes={"corruption": kind, "severity": severe}),
        reason="equal" if tie else kind,
        is_tie=tie,
        notes=subject.notes,
    )


def _alignment_pair(
    config: Preferences, scenes: Scenes, generator: np.random.Generator, key: tuple[object, ...], *, tie: bool
) -> KnownPair | None:
    """A scene that is as the prompt says, or nearly so, and one with more attributes wrong; equal ones are both right.

    A background that the prompt leaves open differs between the two in half of the pairs, and is no fault.
    """
    scene, wording = training_scene(scenes, *key, "scene"), int(generator.integers(NUM_WORDINGS))
    names = [*NAMED_ALWAYS, *(["text"] if scene.text else []), *(["background"] if wording in BACKGROUND_WORDINGS else [])]
    lesser, more = (0, 0) if tie else one_of(NUM_WRONG, generator)
    wrong = [names[place] for place in generator.permutation(len(names))[:more]]
    near, far = (changed(scene, wrong[:num], scenes, keyed_generator(*key, "wrong")) for num in (lesser, more))
    if near is None or far is None:
        return None
    if "background" not in names and generator.random() < 0.5:
        far = changed(far, ["background"], scenes, generator) or far
    shown = [
        Shown(
            picture=render(shows, scenes.size_px, *key, take),
            score=score_of_wrong(num),
            notes={"scene": shows.to_dict(), "wrong": wrong[:num]},
        )
        for shows, num, take in ((near, lesser, "one"), (far, more, "two"))
    ]
    return KnownPair(
        prompt=describe(scene, wording),
        category="text" if scene.text else "scene",
        split=scene_split(config, scene),
        better=shown[0],
        worse=shown[1],
        reason="equal" if tie else f"wrong_{wrong[-1]}" if more == 1 else "more_wrong",
        is_tie=tie,
        notes={"scene": scene.to_dict()},
    )


def _photo_alignment_pair(
    photo: Photo, photos: Sequence[Photo], generator: np.random.Generator, key: tuple[object, ...], *, tie: bool
) -> KnownPair | None:
    """A caption's own picture and another one, which is of the same split; equal ones are two crops of the caption's own."""
    subject = _photo_subject(photo, key)
    others = [other for other in photos if other.caption != photo.caption and other.split == photo.split]
    if not others and not tie:
        return None
    own = subject.draw("one")
    other = subject.draw("two") if tie else fit(one_of(others, generator).picture, (own.height, own.width))
    return KnownPair(
        prompt=subject.prompt,
        category=subject.category,
        split=subject.split,
        better=Shown(picture=own, score=BEST_SCORE),
        worse=Shown(picture=other, score=BEST_SCORE if tie else OTHER_PICTURE_SCORE),
        reason="equal" if tie else "other_picture",
        is_tie=tie,
    )


def _portrait_pair(
    config: Preferences, scenes: Scenes, generator: np.random.Generator, key: tuple[object, ...], *, tie: bool
) -> KnownPair | None:
    """One portrait with fewer and more faults, half of the time none and some; equal ones differ in place and proportions."""
    subject = _portrait_subject(config, scenes, generator, key)
    portrait = random_portrait(*key)
    with_intact = generator.random() < 0.5
    fewer, more = one_of([pair for pair in fault_pairs() if with_intact == (not pair[0])], generator)
    more = fewer if tie else more
    takes = ("one", "two") if tie else ("one", "one")
    shown = [
        Shown(
            picture=render_portrait(portrait, scenes.size_px, faults, *key, take),
            score=score_of(sum(faults.values())),
            notes={"faults": faults},
        )
        for faults, take in zip((fewer, more), takes, strict=True)
    ]
    if not tie and rms_difference(shown[0].picture, shown[1].picture) < MIN_DIFFERENCE:
        return None
    return KnownPair(
        prompt=subject.prompt,
        category=subject.category,
        split=subject.split,
        better=shown[0],
        worse=shown[1],
        reason="equal" if tie else next(name for name in more if more[name] != fewer.get(name)),
        is_tie=tie,
        notes=subject.notes,
    )


def _crop(photo: Photo, key: tuple[object, ...]) -> Image.Image:
    """A keyed crop of the photograph in its own size."""
    return fit(crop_of(photo.picture, keyed_generator(*key)), (photo.picture.height, photo.picture.width))
