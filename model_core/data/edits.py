"""Edit pairs (R1 2.1; Qwen-Image 1.0 report, 3.4): a source, an instruction, and the picture that it asks for.

A plain scene is drawn twice with one thing changed, so that all else is equal to the pixel. Of a photograph, which nobody can
draw again, style and restoration are computed, and the colours of a second one are transferred. No target is a held-out scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from model_core.data.keys import one_of
from model_core.data.sources import SCENES
from model_core.data.synthetic import (
    BACKGROUNDS,
    COLORS,
    NUM_WORDINGS,
    PHOTO,
    SHAPES,
    Scene,
    article,
    describe,
    is_held_out,
    render,
    training_scene,
)
from model_core.documents import UserError
from model_core.recipe import Recipe, Scenes

PHOTO_OPERATIONS = ("multi_reference", "restoration", "style")
STYLES = ("black and white", "sepia")
REPAIR_WORDINGS = {"noise": ("remove the noise", "clean up the noisy image"), "blur": ("sharpen the blurred image", "remove the blur")}
NUM_SECONDS = 20  # second scenes tried for one multi-reference edit
SEPIA = ((0.393, 0.769, 0.189), (0.349, 0.686, 0.168), (0.272, 0.534, 0.131))  # the usual matrix of image editors
LUMA = (0.299, 0.587, 0.114)  # Rec. 601
MIN_LUMA_STEP = 24  # of 255, between a shape and its background, for it to be seen without colours
NOISE_SIGMA = (15.0, 40.0)  # of 255
CROP_SHARE = (0.7, 1.0)  # of each side of a photograph
BLUR_RADIUS = (1.0, 2.0)  # pixels on 64


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An edit pair; `caption` describes the target, `notes` what changed and where it may be seen."""

    references: Sequence[Image.Image]
    target: Image.Image
    instruction: str
    caption: str
    notes: dict[str, Any]


def check_edits(recipe: Recipe) -> None:
    """Raises UserError when all operations need plain scenes and the recipe has none."""
    operations = recipe.edits.operations
    if recipe.edits.num_pairs and SCENES not in recipe.data.sources and not set(operations) & set(PHOTO_OPERATIONS):
        raise UserError(
            f"edits.operations: found {', '.join(operations)}, which need {SCENES} among data.sources; "
            f"allowed for photographs are {', '.join(PHOTO_OPERATIONS)}"
        )


def applies(operation: str, scene: Scene | None) -> bool:
    """Whether an operation can be done on a plain scene, or (None) on a photograph.

    A style takes the colours away, so it asks for a shape that differs from its background in luma too: orange on gray does not.
    """
    if scene is None or scene.background == PHOTO:
        return operation in PHOTO_OPERATIONS
    if operation == "style":
        return abs(_luma(COLORS[scene.color]) - _luma(BACKGROUNDS[scene.background])) >= MIN_LUMA_STEP
    return operation != "removal" or bool(scene.text)


def edit_scene(operation: str, scene: Scene, config: Scenes, generator: np.random.Generator, *jitter_key: object) -> Edit | None:
    """An edit of a plain scene; None when every change would show a held-out one."""
    source = render(scene, config.size_px, *jitter_key)
    wording = int(generator.integers(NUM_WORDINGS))
    if operation == "style":
        style = one_of(STYLES, generator)
        notes = _notes(operation, scene, scene, attribute="style", before="", after=style, region="all")
        return Edit(
            references=[source],
            target=styled(source, style),
            instruction=one_of(style_wordings(style), generator),
            caption=_styled_caption(scene, style),
            notes=notes,
        )
    if operation == "restoration":
        damage, damaged, instruction = damage_of(source, generator)
        notes = _notes(operation, scene, scene, attribute="damage", before=damage, after="", region="all")
        return Edit(references=[damaged], target=source, instruction=instruction, caption=describe(scene, wording), notes=notes)
    if operation == "multi_reference":
        return _scene_from_two(scene, config, generator, *jitter_key)
    possible = [change for change in changes(operation, scene, config) if not is_held_out(replace(scene, **change), config.held_out_share)]
    if not possible:
        return None
    ((attribute, value),) = one_of(possible, generator).items()
    result = replace(scene, **{attribute: value})
    return Edit(
        references=[source],
        target=render(result, config.size_px, *jitter_key),
        instruction=one_of(change_wordings(scene, attribute, value), generator),
        caption=describe(result, wording),
        notes=_notes(
            operation, scene, result, attribute=attribute, before=getattr(scene, attribute), after=value, region=_region(attribute)
        ),
    )


def edit_photo(
    operation: str, photo: Image.Image, caption: str, generator: np.random.Generator, *, second: tuple[Image.Image, str] | None
) -> Edit | None:
    """An edit of any photograph; `second` is another one with its caption. None where it is needed and there is none."""
    if operation == "style":
        style = one_of(STYLES, generator)
        notes = _notes(operation, None, None, attribute="style", before="", after=style, region="all")
        instruction = one_of(style_wordings(style), generator)
        return Edit(
            references=[photo], target=styled(photo, style), instruction=instruction, caption=f"a {style} picture: {caption}", notes=notes
        )
    if operation == "restoration":
        damage, damaged, instruction = damage_of(photo, generator)
        notes = _notes(operation, None, None, attribute="damage", before=damage, after="", region="all")
        return Edit(references=[damaged], target=photo, instruction=instruction, caption=caption, notes=notes)
    if second is None:
        return None
    instruction = one_of(
        ("give the first image the colors of the second image", "use the colors of the second image for the first image"), generator
    )
    notes = _notes(operation, None, None, attribute="colors", before="", after="", region="all")
    target = color_transfer(photo, second[0])
    return Edit(
        references=[photo, second[0]],
        target=target,
        instruction=instruction,
        caption=f"{caption}, in the colors of: {second[1]}",
        notes=notes,
    )


def crop_of(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A drawn crop in the picture's own aspect ratio, so that many edits of one photograph differ."""
    share = generator.uniform(*CROP_SHARE)
    width, height = max(1, round(share * image.width)), max(1, round(share * image.height))
    left, top = (int(generator.integers(room + 1)) for room in (image.width - width, image.height - height))
    return image.crop((left, top, left + width, top + height))


def styled(image: Image.Image, style: str) -> Image.Image:
    """The picture in black and white (Rec. 601 luma) or sepia."""
    matrix = np.array(SEPIA if style == "sepia" else (LUMA, LUMA, LUMA))
    pixels = np.asarray(image, dtype=np.float64) @ matrix.T
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def damage_of(image: Image.Image, generator: np.random.Generator) -> tuple[str, Image.Image, str]:
    """(name, damaged picture, instruction that asks for the undamaged one)."""
    damage = "noise" if generator.random() < 0.5 else "blur"
    return damage, with_damage(image, damage, generator), one_of(REPAIR_WORDINGS[damage], generator)


def with_damage(image: Image.Image, damage: str, generator: np.random.Generator) -> Image.Image:
    """The picture with noise or blur of a drawn strength."""
    if damage == "noise":
        sigma = generator.uniform(*NOISE_SIGMA)
        pixels = np.asarray(image, dtype=np.float64)
        return Image.fromarray((pixels + sigma * generator.standard_normal(pixels.shape)).round().clip(0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(generator.uniform(*BLUR_RADIUS) * max(image.size) / 64))


def color_transfer(image: Image.Image, palette: Image.Image) -> Image.Image:
    """The picture with mean and spread of each YCbCr channel of `palette` (Reinhard 2001, in another opponent colour space)."""
    pixels, wanted = (np.asarray(picture.convert("YCbCr"), dtype=np.float64) for picture in (image, palette))
    axes = (0, 1)
    moved = (pixels - pixels.mean(axes)) * (wanted.std(axes) / np.maximum(pixels.std(axes), 1.0)) + wanted.mean(axes)
    return Image.fromarray(moved.round().clip(0, 255).astype(np.uint8), mode="YCbCr").convert("RGB")


def _scene_from_two(scene: Scene, config: Scenes, generator: np.random.Generator, *jitter_key: object) -> Edit | None:
    """The first picture with one thing of the second: its colour, shape, background or text."""
    for attempt in range(NUM_SECONDS):
        other = training_scene(config, *jitter_key, "second", attempt)
        attribute = one_of(("color", "shape", "background", "text"), generator)
        value = getattr(other, attribute)
        result = replace(scene, **{attribute: value})
        if not value or result == scene or is_held_out(result, config.held_out_share):
            continue
        notes = _notes(
            "multi_reference", scene, result, attribute=attribute, before=getattr(scene, attribute), after=value, region=_region(attribute)
        )
        return Edit(
            references=[render(scene, config.size_px, *jitter_key), render(other, config.size_px, *jitter_key, "second")],
            target=render(result, config.size_px, *jitter_key),
            instruction=one_of(reference_wordings(attribute), generator),
            caption=describe(result, int(generator.integers(NUM_WORDINGS))),
            notes=notes | {"second": other.to_dict()},
        )
    return None


def changes(operation: str, scene: Scene, config: Scenes) -> list[dict[str, str]]:
    """The single changes of an operation, as fields to replace."""
    if operation == "attribute":
        colors = [{"color": name} for name in COLORS if name != scene.color]
        return colors + [{"shape": name} for name in SHAPES if name != scene.shape]
    if operation == "background":
        return [{"background": name} for name in BACKGROUNDS if name != scene.background]
    if operation == "removal":
        return [{"text": ""}]
    texts = [letter + digit for letter in config.letters for digit in config.digits]
    return [{"text": text} for text in texts if text != scene.text]


def change_wordings(scene: Scene, attribute: str, value: str) -> tuple[str, ...]:
    """Instructions that ask for `value` in place of the scene's own."""
    if attribute == "color":
        return f"change the {scene.color} {scene.shape} to {value}", f"make the {scene.shape} {value}"
    if attribute == "shape":
        return (
            f"change the {scene.color} {scene.shape} to {article(value)} {value}",
            f"turn the {scene.shape} into {article(value)} {value}",
        )
    if attribute == "background":
        return f"make the background {value}", f"change the background to {value}"
    if not value:
        return "remove the text", f"remove the text {scene.text}"
    if not scene.text:
        return f"add the text {value}", f"write the text {value}"
    return f"change the text to {value}", f"change the text {scene.text} to {value}"


def reference_wordings(attribute: str) -> tuple[str, ...]:
    """Instructions that ask for an attribute of the second picture."""
    return f"use the {attribute} of the second image in the first image", f"give the first image the {attribute} of the second image"


def style_wordings(style: str) -> tuple[str, ...]:
    """Instructions that ask for a style."""
    return f"make it {style}", f"turn it into a {style} picture"


def _styled_caption(scene: Scene, style: str) -> str:
    text = f" with the text {scene.text}" if scene.text else ""
    return f"a {style} picture of a {scene.shape} on the {scene.position}{text}"


def _luma(color: Sequence[int]) -> float:
    return sum(weight * value for weight, value in zip(LUMA, color, strict=True))


def _region(attribute: str) -> str:
    """Where a change may be seen; all the rest is to stay as it was."""
    return {"color": "shape", "shape": "shape", "text": "text"}.get(attribute, "background")


def _notes(
    operation: str, source: Scene | None, target: Scene | None, *, attribute: str, before: str, after: str, region: str
) -> dict[str, Any]:
    change = {"attribute": attribute, "from": before, "to": after, "region": region}
    scenes = {"source": source.to_dict() if source else None, "target": target.to_dict() if target else None}
    return {"operation": operation, "change": change} | scenes
