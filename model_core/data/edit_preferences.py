"""Preference pairs of edits whose order is known: what was asked for, and what should have stayed.

instruction_following: the right result against the source as it was, another value, another attribute, or half of the change.
visual_consistency: the right result against one in which something else changed as well. What spoils one dimension makes the
ties of the other: a result that follows the instruction but spoils the rest is equal to the right one in instruction_following,
one with the wrong value that leaves the rest alone is equal to it in visual_consistency.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from model_core.data.corruptions import BEST_SCORE, MAX_SEVERITY, corrupt, rms_difference, score_of
from model_core.data.edits import (
    REPAIR_WORDINGS,
    STYLES,
    applies,
    change_wordings,
    changes,
    reference_wordings,
    style_wordings,
    styled,
    with_damage,
)
from model_core.data.keys import keyed_generator, one_of
from model_core.data.known_pairs import KnownPair, Shown, instruction_split, scene_split
from model_core.data.preferences import Split
from model_core.data.scene_changes import MIN_DIFFERENCE, changed, other_value, score_of_wrong
from model_core.data.synthetic import Scene, is_held_out, render, training_scene
from model_core.recipe import Dimension, Preferences, Scenes

SCENE_OPERATIONS = ("attribute", "background", "text", "removal", "style", "restoration", "multi_reference")
PICTURE_OPERATIONS = ("style", "restoration")
REFERENCED = ("color", "shape", "background", "text")  # attributes that a second picture gives
FRAMES = ("{}", "{}", "please {}", "{} and leave the rest as it is", "in this picture, {}")  # ways to say an instruction
ATTRIBUTES = ("color", "shape", "position", "background", "text")
STYLE_LEAVES = ("shape", "position", "text")  # a style takes the colours away
SPOILED = ("noise", "blur", "color_cast", "shift")  # corruptions outside the edited region
SPOILED_STYLE = ("blur", "shift")  # noise has colours, and would be a style that failed
SPOILED_REPAIR = ("shift",)  # noise or blur would be a repair that failed
NUM_EXTRA = ((0, 1), (0, 1), (0, 2), (1, 2))  # attributes that changed though not asked to, in the better and the worse result
SAME_LEVELS = 8  # source and result agree at a pixel whose channels differ by no more than this, of 255
UNCHANGED_SCORE, OTHER_VALUE_SCORE, HALF_SCORE = 1.0, 2.0, 3.0


@dataclass(frozen=True, kw_only=True)
class _Edit:
    """An edit to be done well and badly.

    `scene` and `right` are the scenes before and after, None for a photograph, and `attribute` what changes: `style` or `damage`
    where it is the whole picture. `draw` gives the result for a scene, with the source's jitter.
    """

    sources: Sequence[Image.Image]
    target: Image.Image
    instruction: str
    operation: str
    attribute: str
    scene: Scene | None
    right: Scene | None
    draw: Callable[[Scene], Image.Image]
    other_style: Image.Image | None = None

    @property
    def is_whole(self) -> bool:
        return self.attribute in ("style", "damage")


def edit_pair(
    config: Preferences,
    scenes: Scenes,
    generator: np.random.Generator,
    key: tuple[object, ...],
    *,
    dimension: Dimension,
    source: Scene | tuple[Image.Image, Split],
    tie: bool,
) -> KnownPair | None:
    """A pair of one of the two dimensions of edits, of a scene or of a photograph with its split; None where the draw fails."""
    if isinstance(source, Scene):
        split = scene_split(config, source)
        edit = _scene_edit(config, scenes, source, split, generator, key)
    else:
        split = source[1]
        edit = _picture_edit(config, lambda: source[0], split, generator)
    if edit is None:
        return None
    make = {
        ("instruction_following", False): _followed,
        ("instruction_following", True): _followed_alike,
        ("visual_consistency", False): _consistent,
        ("visual_consistency", True): _consistent_alike,
    }[dimension, tie]
    shown = make(edit, scenes, generator, key)
    if shown is None or rms_difference(shown[0].picture, shown[1].picture) < MIN_DIFFERENCE:
        return None
    return KnownPair(
        prompt=edit.instruction,
        category="edit",
        split=split,
        better=shown[0],
        worse=shown[1],
        reason="equal" if tie else str(shown[1].notes["fault"]),
        is_tie=tie,
        sources=edit.sources,
        notes={
            "operation": edit.operation,
            "attribute": edit.attribute,
            "source": edit.scene.to_dict() if edit.scene else None,
            "target": edit.right.to_dict() if edit.right else None,
        },
    )


def _scene_edit(
    config: Preferences, scenes: Scenes, scene: Scene, split: Split, generator: np.random.Generator, key: tuple[object, ...]
) -> _Edit | None:
    operation = one_of([operation for operation in SCENE_OPERATIONS if applies(operation, scene)], generator)
    if operation in PICTURE_OPERATIONS:
        return _picture_edit(
            config,
            lambda: render(scene, scenes.size_px, *key),
            split,
            generator,
            operation=operation,
            scene=scene,
            size_px=scenes.size_px,
            key=key,
        )
    seconds: list[Scene] = []
    if operation == "multi_reference":
        second, attribute = training_scene(scenes, *key, "second"), one_of(REFERENCED, generator)
        value, wordings = getattr(second, attribute), reference_wordings(attribute)
        if not value or value == getattr(scene, attribute) or scene_split(config, second) != split:
            return None
        seconds.append(second)
    else:
        ((attribute, value),) = one_of(changes(operation, scene, scenes), generator).items()
        wordings = change_wordings(scene, attribute, value)
    right = replace(scene, **{attribute: value})
    instruction = one_of(FRAMES, generator).format(one_of(wordings, generator))
    if is_held_out(right, scenes.held_out_share) or instruction_split(config, instruction) != split:
        return None
    return _Edit(
        sources=[render(scene, scenes.size_px, *key), *(render(second, scenes.size_px, *key, "second") for second in seconds)],
        target=render(right, scenes.size_px, *key),
        instruction=instruction,
        operation=operation,
        attribute=attribute,
        scene=scene,
        right=right,
        draw=lambda shows: render(shows, scenes.size_px, *key),
    )


def _picture_edit(
    config: Preferences,
    open_picture: Callable[[], Image.Image],
    split: Split,
    generator: np.random.Generator,
    *,
    operation: str | None = None,
    scene: Scene | None = None,
    size_px: int = 0,
    key: tuple[object, ...] = (),
) -> _Edit | None:
    """Style or restoration of any picture, which is opened only when the instruction is of its split."""
    operation = operation or one_of(PICTURE_OPERATIONS, generator)
    asked = one_of(STYLES if operation == "style" else tuple(REPAIR_WORDINGS), generator)
    wordings = style_wordings(asked) if operation == "style" else REPAIR_WORDINGS[asked]
    instruction = one_of(FRAMES, generator).format(one_of(wordings, generator))
    if instruction_split(config, instruction) != split:
        return None
    picture = open_picture()
    if operation == "style":
        source, target = picture, styled(picture, asked)
        other_style = styled(picture, next(other for other in STYLES if other != asked))
    else:
        source, target, other_style = with_damage(picture, asked, generator), picture, None

    def draw(shows: Scene) -> Image.Image:
        drawn = render(shows, size_px, *key)
        return styled(drawn, asked) if operation == "style" else drawn

    return _Edit(
        sources=[source],
        target=target,
        instruction=instruction,
        operation=operation,
        attribute="style" if operation == "style" else "damage",
        scene=scene,
        right=scene,
        draw=draw,
        other_style=other_style,
    )


def _followed(edit: _Edit, scenes: Scenes, generator: np.random.Generator, key: tuple[object, ...]) -> tuple[Shown, Shown] | None:
    """The right result, or half of it, against one that does not follow the instruction."""
    right = Shown(picture=edit.target, score=BEST_SCORE)
    unchanged = Shown(picture=edit.sources[0], score=UNCHANGED_SCORE, notes={"fault": "unchanged"})
    if edit.is_whole:
        half = Shown(picture=Image.blend(edit.sources[0], edit.target, 0.5), score=HALF_SCORE, notes={"fault": "half_way"})
        pairs = [(right, unchanged), (right, half), (half, unchanged)]
        if edit.other_style is not None:
            pairs.append((right, Shown(picture=edit.other_style, score=OTHER_VALUE_SCORE, notes={"fault": "other_value"})))
        return one_of(pairs, generator)
    assert edit.scene is not None
    fault = one_of(("unchanged", "other_value", "other_attribute"), generator)
    if fault == "unchanged":
        return right, unchanged
    return _with(right, edit, _misdone(edit, scenes, generator, fault=fault), fault)


def _followed_alike(edit: _Edit, scenes: Scenes, generator: np.random.Generator, key: tuple[object, ...]) -> tuple[Shown, Shown] | None:
    """The right result, and one that follows the instruction as well, whatever else it changes."""
    spoiled = _consistent(edit, scenes, generator, key) if edit.is_whole else _with_extra(edit, scenes, generator, key)
    return None if spoiled is None else (Shown(picture=edit.target, score=BEST_SCORE), replace(spoiled[1], score=BEST_SCORE))


def _consistent(edit: _Edit, scenes: Scenes, generator: np.random.Generator, key: tuple[object, ...]) -> tuple[Shown, Shown] | None:
    """The right result against one in which another attribute changed too, or that is spoiled outside the edited region."""
    if edit.right is not None and generator.random() < 0.5:
        return _with_extra(edit, scenes, generator, key)
    kind = one_of({"style": SPOILED_STYLE, "damage": SPOILED_REPAIR}.get(edit.attribute, SPOILED), generator)
    mild = 0 if generator.random() < 0.5 else int(generator.integers(1, MAX_SEVERITY))
    severe = int(generator.integers(mild + 1, MAX_SEVERITY + 1))
    better, worse = (
        Shown(
            picture=_spoiled(edit, kind, severity, *key),
            score=score_of(severity),
            notes={"fault": f"{kind}_outside" if severity else "", "severity": severity},
        )
        for severity in (mild, severe)
    )
    if rms_difference(edit.target, worse.picture) < rms_difference(edit.target, better.picture) + MIN_DIFFERENCE:
        return None  # such as a blur where there are no edges
    return better, worse


def _with_extra(edit: _Edit, scenes: Scenes, generator: np.random.Generator, key: tuple[object, ...]) -> tuple[Shown, Shown] | None:
    """Results in which fewer and more attributes changed that were not to."""
    assert edit.right is not None
    names = STYLE_LEAVES if edit.attribute == "style" else tuple(name for name in ATTRIBUTES if name != edit.attribute)
    few, many = one_of(NUM_EXTRA, generator)
    extra = [names[place] for place in generator.permutation(len(names))[:many]]
    fewer, more = (changed(edit.right, extra[:num], scenes, keyed_generator(*key, "extra")) for num in (few, many))
    if fewer is None or more is None:
        return None
    fault = f"other_{extra[-1]}"
    return (
        Shown(picture=edit.draw(fewer), score=score_of_wrong(few), notes={"fault": fault if few else "", "extra": extra[:few]}),
        Shown(picture=edit.draw(more), score=score_of_wrong(many), notes={"fault": fault, "extra": extra}),
    )


def _consistent_alike(edit: _Edit, scenes: Scenes, generator: np.random.Generator, key: tuple[object, ...]) -> tuple[Shown, Shown] | None:
    """The right result, and one that leaves all else alone as well but does not do what was asked."""
    right = Shown(picture=edit.target, score=BEST_SCORE)
    if edit.is_whole:
        half = Image.blend(edit.sources[0], edit.target, 0.5) if edit.other_style is None else edit.other_style
        return right, Shown(picture=half, score=BEST_SCORE, notes={"fault": "half_way" if edit.other_style is None else "other_value"})
    pair = _with(right, edit, _misdone(edit, scenes, generator, fault="other_value"), "other_value")
    return None if pair is None else (pair[0], replace(pair[1], score=BEST_SCORE))


def _misdone(edit: _Edit, scenes: Scenes, generator: np.random.Generator, *, fault: str) -> Scene | None:
    """The source with the asked attribute changed to another value, or with another attribute changed in its place."""
    assert edit.scene is not None
    assert edit.right is not None
    if fault == "other_attribute":
        name = one_of([name for name in ATTRIBUTES if name != edit.attribute], generator)
        return changed(edit.scene, [name], scenes, generator)
    value = other_value(edit.scene, edit.attribute, scenes, generator)
    result = replace(edit.scene, **{edit.attribute: value})
    return None if result == edit.right or is_held_out(result, scenes.held_out_share) else result


def _with(right: Shown, edit: _Edit, wrong: Scene | None, fault: str) -> tuple[Shown, Shown] | None:
    if wrong is None:
        return None
    score = OTHER_VALUE_SCORE if fault == "other_value" else UNCHANGED_SCORE
    return right, Shown(picture=edit.draw(wrong), score=score, notes={"fault": fault, "scene": wrong.to_dict()})


def _spoiled(edit: _Edit, kind: str, severity: int, *key: object) -> Image.Image:
    """The right result with a corruption wherever source and result agree; all over it where the whole picture was to change."""
    spoiled = corrupt(edit.target, kind, severity, *key)
    if edit.is_whole or severity == 0:
        return spoiled
    before, after = (np.asarray(picture, dtype=np.int16) for picture in (edit.sources[0], edit.target))
    same = np.abs(before - after).max(axis=2) <= SAME_LEVELS
    return Image.fromarray(np.where(same[..., None], np.asarray(spoiled), np.asarray(edit.target)))
