"""evaluate_model: fixed-seed pictures and edits of held-out prompts, read by a judge that training never sees.

Takes the last stage's weights, the VAE, the encoder, the captions and the raw pictures and edits; leaves `scores.json`,
`prompts.json`, `edits.json`, `reconstructions.json` and the pictures they name. Plain scenes and their edits are judged
when the data holds scenes; users' photographs are drawn from their held-out captions, and their edits measured against the
known targets. Harder prompts are scored apart, under `hard/`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from model_core.context import StepContext
from model_core.data.buckets import bucket, fit
from model_core.data.contact_sheet import contact_sheet
from model_core.data.edits import Edit
from model_core.data.folders import Folder
from model_core.data.keys import keyed_generator
from model_core.data.pixels import image_tensor
from model_core.data.shards import RawRow, decode_image, read_rows
from model_core.data.synthetic import PHOTO, compose, held_out_scenes, render
from model_core.evaluation.attributes import SCORED, Prompt, plain_prompts, shares
from model_core.evaluation.drawing import Request, draw, open_painter, reconstruct
from model_core.evaluation.edits import judge_edit, psnr_gain, scene_edits
from model_core.evaluation.evidence import Evidence, mean
from model_core.evaluation.hard import photo_scene_prompts, read_photo_scene, read_two_shapes, read_word, two_shape_prompts, word_prompts
from model_core.evaluation.judge import Judge, accuracy
from model_core.evaluation.reconstruction import psnr, ssim
from model_core.training.distributed import compute_device, keep_deterministic

NUM_CHECKED = 160  # held-out renders on which the judge is checked
NUM_CHECKED_AGAIN = 64  # of them read again after the autoencoder and over photographs: what a score can reach at most
MIN_JUDGE_ACCURACY = 0.98
NO_SCENES = "the data holds no plain scenes, so their judge does not apply: there are no judge/ and edit/ scores"


def run(context: StepContext) -> dict[str, Any]:
    """Draws, reads and scores; returns the scores, warnings and seconds. Raises RuntimeError when the judge fails its own check."""
    began = time.monotonic()
    keep_deterministic(compute_device())
    inputs, config, seed = context.inputs, context.recipe.evaluation, context.recipe.seed
    pictures = _held_out(inputs["images"], config.num_reconstructions, seed=seed)
    edits = _held_out(inputs["edits"], config.num_edits, seed=seed)
    photos = [row for row in pictures.rows if "shape" not in row.notes()][: config.grid_prompts]
    photo_edits = [row for row in edits.rows if row.notes()["source"] is None]

    evaluation = _Evaluation(context)
    evaluation.reconstruct(pictures)
    if pictures.any_scene:
        judge = evaluation.checked_judge(photos)
        evaluation.judge_prompts(judge)
        evaluation.judge_hard_prompts(judge, with_photos=bool(photos))
        evaluation.judge_edits(judge, edits.operations)
    else:
        evaluation.evidence.warnings.append(NO_SCENES)
    evaluation.draw_captions(photos)
    evaluation.measure_photo_edits(photo_edits)
    if not evaluation.evidence.edits:
        evaluation.evidence.warnings.append("there was no held-out edit to draw")

    scores = evaluation.evidence.write()
    context.tracker.metrics(scores, step=0)
    return scores | {"warnings": evaluation.evidence.warnings, "seconds": round(time.monotonic() - began, 3)}


class _Evaluation:
    """The parts of the evaluation, which share a model and the evidence."""

    def __init__(self, context: StepContext) -> None:
        inputs, recipe = context.inputs, context.recipe
        self.context, self.config, self.scenes, self.seed = context, recipe.evaluation, recipe.data.scenes, recipe.seed
        self.painter = open_painter(
            mmdit=inputs["model"].folder("mmdit"),
            vae=inputs["vae"].folder("vae"),
            encoder=inputs["encoder"].folder("encoder"),
            sampling=recipe.sampling,
        )
        stage = inputs["model"].manifest.stage or recipe.stages[-1]  # an aligned model is the last stage's
        self.resolution_px = recipe.mmdit.stages[stage].resolution_px
        self.size_px = (self.resolution_px, self.resolution_px)
        self.evidence = Evidence(context.output, self.config.grid_prompts)

    def reconstruct(self, held_out: _Rows) -> None:
        """PSNR and SSIM of held-out pictures after encoding and decoding."""
        if held_out.fallback:
            self.evidence.warnings.append("no picture is held out, so the reconstructions shown and scored were trained on")
        originals = [self._fitted(decode_image(row.image)) for row in held_out.rows]
        for original, decoded in zip(originals, reconstruct(self.painter.vae, originals), strict=True):
            pair = image_tensor(decoded)[None], image_tensor(original)[None]
            self.evidence.add_reconstruction(original, decoded, {"psnr": psnr(*pair).item(), "ssim": ssim(*pair).item()})
        for name in ("psnr", "ssim"):
            self.evidence.scores[f"vae/{name}"] = mean(entry[name] for entry in self.evidence.reconstructions)

    def checked_judge(self, photos: Sequence[RawRow]) -> Judge:
        """The judge, after its own check on clean held-out renders; its accuracy after the autoencoder and over photographs is noted."""
        judge, scores = Judge(self.scenes), self.evidence.scores
        clean = judge.validate(NUM_CHECKED, seed=self.seed)
        scores |= {f"judge_check/{name}": value for name, value in clean.items()}
        if min(clean.values()) < MIN_JUDGE_ACCURACY:
            raise RuntimeError(f"the judge reads clean held-out renders with {clean}; below {MIN_JUDGE_ACCURACY} its scores mean nothing")
        scenes = held_out_scenes(NUM_CHECKED_AGAIN, self.scenes, seed=self.seed)
        renders = [fit(render(scene, self.scenes.size_px, self.seed, "check", index), self.size_px) for index, scene in enumerate(scenes)]
        read = accuracy(scenes, [judge.read(picture) for picture in reconstruct(self.painter.vae, renders)])
        scores["judge_check/after_vae"] = mean(read[name] for name in SCORED)
        if photos:
            grounds = [fit(decode_image(photo.image), self.size_px) for photo in photos]
            over = [
                compose(replace(scene, background=PHOTO), grounds[index % len(grounds)], self.seed, "check", index)
                for index, scene in enumerate(scenes)
            ]
            read = accuracy(scenes, [judge.read(picture) for picture in over])
            scores["judge_check/over_photos"] = mean(read[name] for name in SCORED)
        return judge

    def judge_prompts(self, judge: Judge) -> None:
        """Plain scenes whose combination and text are held out."""
        prompts = plain_prompts(self.config.num_prompts, self.scenes, seed=self.seed)
        pictures = self._draw([Request(prompt.text, prompt.seed, self.size_px) for prompt in prompts], "prompts")
        verdicts = [
            self.evidence.add_prompt("plain", prompt, picture, reading=asdict(judge.read(picture)))
            for prompt, picture in zip(prompts, pictures, strict=True)
        ]
        self.evidence.scores |= {f"judge/{name}": value for name, value in shares(verdicts).items()}
        grid = self.context.output / "samples.png"
        contact_sheet([[picture] for picture in pictures[: self.config.grid_prompts]], columns=4).save(grid)
        self.context.tracker.image("samples", grid, 0)

    def judge_hard_prompts(self, judge: Judge, *, with_photos: bool) -> None:
        """Prompts beyond what training shows, an eighth as many of each kind."""
        num = max(2, self.config.num_prompts // 8)
        groups = {
            "two_shapes": two_shape_prompts(num, seed=self.seed),
            "words": word_prompts(num, self.scenes, seed=self.seed),
            "photo_scenes": photo_scene_prompts(num, self.scenes, seed=self.seed) if with_photos else [],
        }
        prompts = [(group, prompt) for group, members in groups.items() for prompt in members]
        pictures = self._draw([Request(prompt.text, prompt.seed, self.size_px) for _, prompt in prompts], "harder prompts")
        right: dict[str, list[bool]] = defaultdict(list)
        for (group, prompt), picture in zip(prompts, pictures, strict=True):
            right[group] += self.evidence.add_prompt(group, prompt, picture, reading=_read_hard(judge, group, prompt, picture)).values()
        self.evidence.scores |= {f"hard/{group}": mean(values) for group, values in right.items()}

    def judge_edits(self, judge: Judge, operations: Sequence[str]) -> None:
        """Edits of held-out scenes, by every operation that the data has."""
        edits = [
            replace(edit, references=[fit(image, self.size_px) for image in edit.references], target=fit(edit.target, self.size_px))
            for edit in scene_edits(self.config.num_edits, operations, self.scenes, seed=self.seed)
        ]
        success: dict[str, list[bool]] = defaultdict(list)
        consistency = []
        for edit, result in zip(edits, self._draw_edits(edits), strict=True):
            reading = judge.read(result)
            verdict = judge_edit(edit, result, reading)
            success[edit.notes["operation"]].append(verdict.success)
            consistency.append(verdict.consistency)
            self.evidence.add_edit(edit, result, asdict(verdict) | {"reading": asdict(reading)})
        if edits:
            self.evidence.scores["edit/success"] = mean(value for values in success.values() for value in values)
            self.evidence.scores["edit/consistency"] = mean(consistency)
            self.evidence.scores |= {f"edit_success/{operation}": mean(values) for operation, values in sorted(success.items())}

    def draw_captions(self, photos: Sequence[RawRow]) -> None:
        """Pictures from the captions of held-out photographs: shown beside them, not scored."""
        if not photos:
            return
        table = pq.read_table(self.context.inputs["captions"].path("captions.parquet"), columns=["sample_id", "general"])
        captions = dict(zip(table["sample_id"].to_pylist(), table["general"].to_pylist(), strict=True))
        originals = [self._fitted(decode_image(row.image)) for row in photos]
        prompts = [Prompt(captions.get(row.sample_id, row.caption), index, {}) for index, row in enumerate(photos)]
        requests = [
            Request(prompt.text, prompt.seed, (photo.height, photo.width)) for prompt, photo in zip(prompts, originals, strict=True)
        ]
        for prompt, picture, original in zip(prompts, self._draw(requests, "captions"), originals, strict=True):
            self.evidence.add_prompt("captions", prompt, picture, original=original)

    def measure_photo_edits(self, rows: Sequence[RawRow]) -> None:
        """Held-out edits of photographs: how much nearer the result is to the known target than the source was."""
        edits = []
        for row in rows:
            target = self._fitted(decode_image(row.image))
            references = [fit(decode_image(image), (target.height, target.width)) for image in row.references]
            edits.append(Edit(references=references, target=target, instruction=row.instruction, caption=row.caption, notes=row.notes()))
        gains = []
        for edit, result in zip(edits, self._draw_edits(edits), strict=True):
            gains.append(psnr_gain(result, source=edit.references[0], target=edit.target))
            self.evidence.add_edit(edit, result, {"psnr_gain": gains[-1]})
        if gains:
            self.evidence.scores["photo_edit/psnr_gain"] = mean(gains)

    def _draw_edits(self, edits: Sequence[Edit]) -> list[Image.Image]:
        requests = [
            Request(edit.instruction, index, (edit.target.height, edit.target.width), edit.references) for index, edit in enumerate(edits)
        ]
        return self._draw(requests, "edits")

    def _draw(self, requests: Sequence[Request], what: str) -> list[Image.Image]:
        done = 0

        def count(num: int) -> None:
            nonlocal done
            done += num
            self.context.progress.say(f"{done}/{len(requests)} {what} drawn")

        return draw(self.painter, requests, on_drawn=count)

    def _fitted(self, picture: Image.Image) -> Image.Image:
        return fit(picture, bucket(picture.width, picture.height, self.resolution_px, multiple_px=self.painter.encoder.multiple_px))


@dataclass(frozen=True)
class _Rows:
    """Held-out rows of one input, and what the whole input holds. `fallback`: nothing is held out, so any rows were taken."""

    rows: list[RawRow]
    operations: list[str]
    any_scene: bool
    fallback: bool


def _held_out(folder: Folder, num: int, *, seed: int) -> _Rows:
    """A keyed choice of `num` held-out rows; where none is held out, of all rows."""
    ids: dict[bool, list[bytes]] = {True: [], False: []}
    operations: set[str] = set()
    any_scene = False
    for row in read_rows(folder, columns=("sample_id", "held_out", "operation", "annotation")):
        ids[row.held_out].append(row.sample_id)
        operations.add(row.operation)
        any_scene = any_scene or "shape" in row.notes()
    candidates = ids[True] or ids[False]
    chosen = {candidates[index] for index in keyed_generator(seed, "evaluated rows").permutation(len(candidates))[:num]}
    rows = [row for row in read_rows(folder) if row.sample_id in chosen] if chosen else []
    return _Rows(rows, sorted(operations - {""}), any_scene, fallback=not ids[True])


def _read_hard(judge: Judge, group: str, prompt: Prompt, picture: Image.Image) -> dict[str, Any]:
    if group == "two_shapes":
        return read_two_shapes(judge, picture, prompt.asked)
    if group == "words":
        return {"word": read_word(picture)[0]}
    return read_photo_scene(judge, picture)
