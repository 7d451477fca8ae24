"""Pictures made worse on purpose: a reward must fall where the fault is one that its dimension is about.

| perturbation | what is done | must fall |
|---|---|---|
| blur | Gaussian blur, radius 1/32 of the side | aesthetics, visual_consistency |
| saturation | colours three times as far from gray | aesthetics, visual_consistency |
| high_frequency | a checkerboard of 24 levels, cell by cell | aesthetics, visual_consistency |
| copied_source | the first source in place of the result | instruction_following |
| duplicated_text | the text of a plain scene once more, where nothing is | alignment |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from model_core.data.reward_pairs import Pair
from model_core.data.shards import decode_image
from model_core.recipe import Dimension

LOOKS: tuple[Dimension, ...] = ("aesthetics", "visual_consistency")
BLUR_SHARE, SATURATION, CHECKER_LEVELS = 1 / 32, 3.0, 24
# Of the side, by where the shape is: left, top, right and bottom of the text, and where neither shape nor text is (data/synthetic.py).
TEXT_BOXES = {
    "left": ((0.5, 0.5, 1.0, 0.75), (0.5, 0.125)),
    "right": ((0.0, 0.5, 0.5, 0.75), (0.0, 0.125)),
    "top": ((0.25, 0.75, 0.75, 1.0), (0.25, 0.5)),
    "bottom": ((0.25, 0.0, 0.75, 0.25), (0.25, 0.25)),
}

Perturb = Callable[[Image.Image, Pair, str], Image.Image | None]


def blur(picture: Image.Image, _pair: Pair, _side: str) -> Image.Image:
    """Blurred."""
    return picture.filter(ImageFilter.GaussianBlur(BLUR_SHARE * max(picture.size)))


def saturation(picture: Image.Image, _pair: Pair, _side: str) -> Image.Image:
    """In garish colours."""
    return ImageEnhance.Color(picture).enhance(SATURATION)


def high_frequency(picture: Image.Image, _pair: Pair, _side: str) -> Image.Image:
    """Under a checkerboard of single pixels."""
    pixels = np.asarray(picture, dtype=np.int16)
    signs = np.where(np.indices(pixels.shape[:2]).sum(axis=0) % 2, CHECKER_LEVELS, -CHECKER_LEVELS)
    return Image.fromarray((pixels + signs[..., None]).clip(0, 255).astype(np.uint8))


def copied_source(_picture: Image.Image, pair: Pair, _side: str) -> Image.Image | None:
    """The first source itself."""
    return decode_image(pair.sources[0]) if pair.sources else None


def duplicated_text(picture: Image.Image, pair: Pair, side: str) -> Image.Image | None:
    """With its text twice; None where it is no plain scene with a text."""
    scene: Mapping[str, str] = pair.notes.get(side, {}).get("scene") or {}
    if not scene.get("text"):
        return None
    box, place = TEXT_BOXES[scene["position"]]
    copy = picture.copy()
    copy.paste(picture.crop(tuple(round(share * picture.width) for share in box)), tuple(round(share * picture.width) for share in place))  # type: ignore[arg-type]
    return copy


PERTURBATIONS: dict[str, tuple[Perturb, tuple[Dimension, ...]]] = {
    "blur": (blur, LOOKS),
    "saturation": (saturation, LOOKS),
    "high_frequency": (high_frequency, LOOKS),
    "copied_source": (copied_source, ("instruction_following",)),
    "duplicated_text": (duplicated_text, ("alignment",)),
}


def perturbed(pair: Pair, side: str, name: str) -> Image.Image | None:
    """Picture a or b of a pair under a perturbation; None where it does not apply."""
    picture = decode_image(pair.image_a if side == "a" else pair.image_b).convert("RGB")
    return PERTURBATIONS[name][0](picture, pair, side)
