"""Whether an edit did what was asked, and left alone what was not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from model_core.data.edits import Edit, applies, edit_scene
from model_core.data.keys import keyed_generator
from model_core.data.synthetic import held_out_scenes
from model_core.evaluation.judge import ATTRIBUTES, Reading
from model_core.recipe import Scenes

MIN_GAIN_DB = 1.0  # a style or a restoration succeeds when the result is nearer to the known target than the source by this
SAME_LEVELS = 8  # source and target agree at a pixel whose channels differ by no more than this, of 255
MIN_SAME_SHARE = 0.05  # of the picture; with less in common there is no "outside the edited region"
STYLE_KEEPS = ("shape", "position", "text")  # a style is asked to change the colours


@dataclass(frozen=True)
class EditVerdict:
    """`success`: the asked change is there. `consistency`: 0 to 1, how much of the rest stayed. `kept`: attribute by attribute."""

    success: bool
    consistency: float
    kept: dict[str, bool]


def scene_edits(num: int, operations: Sequence[str], config: Scenes, *, seed: int) -> list[Edit]:
    """`num` edits of held-out scenes, operations in turn. Neither source nor target was ever shown in training."""
    free = config.model_copy(update={"held_out_share": 0.0})  # here a change may lead to a held-out scene
    edits: list[Edit] = []
    for index, scene in enumerate(held_out_scenes(4 * num, config, seed=seed)):
        possible = [operation for operation in operations if applies(operation, scene)]
        if len(edits) == num or not possible:
            break
        operation = possible[len(edits) % len(possible)]
        edit = edit_scene(operation, scene, free, keyed_generator(seed, "evaluated edit", index), seed, "evaluated edit", index)
        if edit is not None:
            edits.append(edit)
    return edits


def judge_edit(edit: Edit, result: Image.Image, reading: Reading) -> EditVerdict:
    """The verdict on `result`, of which `reading` is what the judge saw.

    Success: the changed attribute of a scene reads as asked; for a style or a restoration, which a scene's attributes do not
    tell, the result is nearer to the known target than the source was, by MIN_GAIN_DB. Consistency: the share of the attributes
    not asked to change that read as in the target, averaged with 1 - the mean absolute difference (as a share of the value
    range) between result and source over the pixels in which source and target agree; the share alone where there are none, or
    where the whole picture is to change.
    """
    change, target = edit.notes["change"], edit.notes["target"]
    if change["attribute"] in ATTRIBUTES:
        success = getattr(reading, change["attribute"]) == change["to"]
        names = [name for name in ATTRIBUTES if name != change["attribute"]]
    else:
        success = psnr_gain(result, source=edit.references[0], target=edit.target) >= MIN_GAIN_DB
        names = list(STYLE_KEEPS if edit.notes["operation"] == "style" else ATTRIBUTES)
    kept = {name: getattr(reading, name) == target[name] for name in names}
    consistency = float(np.mean(list(kept.values())))
    outside = None if change["region"] == "all" else change_outside(result, source=edit.references[0], target=edit.target)
    return EditVerdict(bool(success), consistency if outside is None else (consistency + 1 - outside) / 2, kept)


def change_outside(result: Image.Image, *, source: Image.Image, target: Image.Image) -> float | None:
    """Mean absolute difference (0 to 1) of result and source where source and target agree; None where they hardly do."""
    before, after, wanted = (np.asarray(image.convert("RGB"), dtype=np.float64) for image in (source, result, target))
    same = np.abs(before - wanted).max(axis=2) <= SAME_LEVELS
    if same.mean() < MIN_SAME_SHARE:
        return None
    return float(np.abs(after - before)[same].mean() / 255)


def psnr_gain(result: Image.Image, *, source: Image.Image, target: Image.Image) -> float:
    """How much nearer (dB of PSNR) the result is to the target than the source was."""
    wanted = np.asarray(target.convert("RGB"), dtype=np.float64)
    errors = [np.mean((np.asarray(image.convert("RGB"), dtype=np.float64) - wanted) ** 2) for image in (source, result)]
    before, after = (max(float(error), 0.05) for error in errors)  # 0.05: a picture that is equal after rounding counts as 61 dB
    return float(10 * np.log10(before / after))
