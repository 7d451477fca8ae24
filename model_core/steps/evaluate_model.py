"""evaluate_model: fixed-seed pictures and edits of held-out prompts, read by a judge that training never sees.

Takes the last stage's weights, the VAE, the encoder, the captions and the raw pictures and edits; leaves `scores.json`,
`prompts.json`, `edits.json`, `reconstructions.json` and the pictures they name. Plain scenes and their edits are judged
when the data holds scenes; users' photographs are drawn from their held-out captions, and their edits measured against the
known targets. Harder prompts are scored apart, under `hard/`.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from model_core.context import StepContext
from model_core.data.buckets import bucket, fit
from model_core.data.contact_sheet import contact_sheet
from model_core.data.edits import Edit
from model_core.data.keys import keyed_generator
from model_core.data.shards import Folder, RawRow, decode_image, read_rows
from model_core.data.synthetic import PHOTO, compose, held_out_scenes, render
from model_core.evaluation.attributes import Prompt, compare, plain_prompts, shares
from model_core.evaluation.drawing import Painter, Request, draw, reconstruct
from model_core.evaluation.edits import judge_edit, psnr_gain, scene_edits
from model_core.evaluation.hard import photo_scene_prompts, read_two_shapes, read_word, two_shape_prompts, word_prompts
from model_core.evaluation.judge import Judge, accuracy
from model_core.evaluation.reconstruction import psnr, ssim
from model_core.models.condition import load_encoder
from model_core.models.mmdit import load_mmdit
from model_core.models.vae import load_vae

CHECK_RENDERS = 256  # held-out renders on which the judge is checked
CHECK_RECONSTRUCTIONS = 64  # of them read again after the autoencoder, which bounds what any score can reach
MIN_JUDGE_ACCURACY = 0.98
MAX_PSNR = 100.0  # dB, of a picture that comes back without any error


@dataclass
class _Result:
    """What has been found so far."""

    scores: dict[str, float] = field(default_factory=dict)
    prompts: list[dict[str, Any]] = field(default_factory=list)
    edits: list[dict[str, Any]] = field(default_factory=list)
    reconstructions: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def run(context: StepContext) -> dict[str, Any]:
    """Draws, reads and scores; returns the scores, warnings and seconds. Raises RuntimeError when the judge fails its own check."""
    began = time.monotonic()
    torch.use_deterministic_algorithms(True)
    inputs, config = context.inputs, context.recipe.evaluation
    painter = Painter(
        mmdit=load_mmdit(inputs["model"].folder("mmdit")).eval(),
        vae=load_vae(inputs["vae"].folder("vae")).eval(),
        encoder=load_encoder(inputs["encoder"].folder("encoder")),
        sampling=context.recipe.sampling,
    )
    evaluation = _Evaluation(context, painter)
    held_out = _held_out_rows(inputs["images"], config.num_reconstructions, seed=context.recipe.seed)
    edit_rows = _held_out_rows(inputs["edits"], config.num_edits, seed=context.recipe.seed)
    photos = [row for row in held_out.rows if "shape" not in row.notes()][: config.grid_prompts]
    photo_edits = [row for row in edit_rows.rows if row.notes().get("source") is None]

    evaluation.reconstruct(held_out)
    if held_out.any_scene:
        evaluation.judge_scenes(edit_rows.operations, photos)
    else:
        evaluation.result.warnings.append(
            "the data holds no plain scenes, so the judge of scenes does not apply: there are no judge/ and edit/ scores"
        )
    evaluation.draw_captions(photos)
    evaluation.score_photo_edits(photo_edits)
    return evaluation.write() | {"data_seconds": round(time.monotonic() - began, 3)}


class _Evaluation:
    """The parts of the evaluation, which share a painter, a folder and a growing result."""

    def __init__(self, context: StepContext, painter: Painter) -> None:
        self.context, self.painter, self.result = context, painter, _Result()
        self.config, self.scenes, self.seed = context.recipe.evaluation, context.recipe.data.scenes, context.recipe.seed
        stage = context.inputs["model"].manifest.stage
        self.resolution_px = context.recipe.mmdit.stages[stage].resolution_px if stage else self.scenes.size_px
        self.size_px = (self.resolution_px, self.resolution_px)
        self._drawn = 0

    def reconstruct(self, held_out: _Rows) -> None:
        """PSNR and SSIM of held-out pictures after encoding and decoding."""
        if held_out.fallback:
            self.result.warnings.append("no picture is held out, so the reconstructions shown and scored were trained on")
        pictures = [self._fitted(decode_image(row.image)) for row in held_out.rows]
        decoded = reconstruct(self.painter.vae, pictures)
        for index, (before, after) in enumerate(zip(pictures, decoded, strict=True)):
            pair = [torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] for picture in (after, before)]
            entry = {"psnr": min(psnr(*pair).item(), MAX_PSNR), "ssim": ssim(*pair).item()}
            names = (
                self._save(f"reconstructions/{index:03d}", {"original": before, "decoded": after})
                if index < self.config.grid_prompts
                else {}
            )
            self.result.reconstructions.append(entry | names)
        for name in ("psnr", "ssim"):
            self.result.scores[f"vae/{name}"] = _mean(entry[name] for entry in self.result.reconstructions)

    def judge_scenes(self, operations: Sequence[str], photos: Sequence[RawRow]) -> None:
        """Plain prompts, harder ones and edits of scenes, read by the judge once it has passed its own check."""
        judge = Judge(self.scenes)
        self._check(judge, photos)
        prompts = plain_prompts(self.config.num_prompts, self.scenes, seed=self.seed)
        pictures = self._draw([Request(prompt.text, prompt.seed, self.size_px) for prompt in prompts], "prompts drawn")
        readings = [judge.read(picture) for picture in pictures]
        verdicts = [compare(reading, prompt.asked) for reading, prompt in zip(readings, prompts, strict=True)]
        self.result.scores |= {f"judge/{name}": value for name, value in shares(verdicts).items()}
        for prompt, picture, reading in zip(prompts, pictures, readings, strict=True):
            self._record("plain", prompt, picture, reading=asdict(reading))
        sheet = contact_sheet([[picture] for picture in pictures[: self.config.grid_prompts]], columns=4)
        sheet.save(self.context.output / "samples.png")
        self.context.tracker.image("samples", self.context.output / "samples.png", 0)

        num_hard = max(2, self.config.num_prompts // 8)
        groups = {
            "two_shapes": two_shape_prompts(num_hard, seed=self.seed),
            "words": word_prompts(num_hard, self.scenes, seed=self.seed),
            "photo_scenes": photo_scene_prompts(num_hard, self.scenes, seed=self.seed) if photos else [],
        }
        for group, hard in groups.items():
            drawn = self._draw([Request(prompt.text, prompt.seed, self.size_px) for prompt in hard], f"{group} drawn")
            right: list[bool] = []
            for prompt, picture in zip(hard, drawn, strict=True):
                seen = _read_hard(judge, group, picture, prompt.asked)
                right += [seen[name] == value for name, value in prompt.asked.items()]
                self._record(group, prompt, picture, reading=seen)
            if hard:
                self.result.scores[f"hard/{group}"] = _mean(right)
        self._judge_edits(judge, scene_edits(self.config.num_edits, operations, self.scenes, seed=self.seed))

    def draw_captions(self, photos: Sequence[RawRow]) -> None:
        """Pictures from the captions of held-out photographs: shown beside them, not scored."""
        known = (
            pq.read_table(self.context.inputs["captions"].path("captions.parquet"), columns=["sample_id", "general"]) if photos else None
        )
        captions = dict(zip(known["sample_id"].to_pylist(), known["general"].to_pylist(), strict=True)) if known is not None else {}
        originals = [self._fitted(decode_image(row.image)) for row in photos]
        prompts = [Prompt(captions.get(row.sample_id, row.caption), index, {}) for index, row in enumerate(photos)]
        requests = [
            Request(prompt.text, prompt.seed, (photo.height, photo.width)) for prompt, photo in zip(prompts, originals, strict=True)
        ]
        for prompt, picture, original in zip(prompts, self._draw(requests, "captions drawn"), originals, strict=True):
            self._record("captions", prompt, picture, original=original)

    def score_photo_edits(self, rows: Sequence[RawRow]) -> None:
        """Held-out edits of photographs: how much nearer the result is to the known target than the source was."""
        edits = []
        for row in rows:
            target = self._fitted(decode_image(row.image))
            references = [fit(decode_image(image), (target.height, target.width)) for image in row.references]
            edits.append(Edit(references=references, target=target, instruction=row.instruction, caption=row.caption, notes=row.notes()))
        gains = []
        for index, (edit, result) in enumerate(zip(edits, self._draw_edits(edits), strict=True)):
            gains.append(psnr_gain(result, source=edit.references[0], target=edit.target))
            self._record_edit(f"edits/photo-{index:03d}", edit, result, {"psnr_gain": gains[-1]}, shown=index < self.config.grid_prompts)
        if gains:
            self.result.scores["photo_edit/psnr_gain"] = _mean(gains)

    def write(self) -> dict[str, Any]:
        """Writes what was found; returns it as the step's statistics."""
        if not self.result.edits:
            self.result.warnings.append("there was no edit to score: the data holds no held-out edits")
        scores = {name: round(value, 5) for name, value in self.result.scores.items()}
        documents = {
            "scores": scores,
            "prompts": self.result.prompts,
            "edits": self.result.edits,
            "reconstructions": self.result.reconstructions,
            "warnings": self.result.warnings,
        }
        for name, document in documents.items():
            (self.context.output / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self.context.tracker.metrics(scores, step=0)
        return scores | {"warnings": self.result.warnings, "pictures": self._drawn}

    def _check(self, judge: Judge, photos: Sequence[RawRow]) -> None:
        """The judge's own accuracy: on clean held-out renders, which it must pass, after the autoencoder, and over photographs."""
        checked = judge.validate(CHECK_RENDERS, seed=self.seed)
        self.result.scores |= {f"judge_check/{name}": value for name, value in checked.items()}
        if min(checked.values()) < MIN_JUDGE_ACCURACY:
            raise RuntimeError(f"the judge reads held-out renders with {checked}; below {MIN_JUDGE_ACCURACY} its scores mean nothing")
        scenes = held_out_scenes(CHECK_RECONSTRUCTIONS, self.scenes, seed=self.seed)
        renders = [fit(render(scene, self.scenes.size_px, self.seed, "check", index), self.size_px) for index, scene in enumerate(scenes)]
        read = accuracy(scenes, [judge.read(picture) for picture in reconstruct(self.painter.vae, renders)])
        self.result.scores["judge_check/after_vae"] = _mean(read[name] for name in ("color", "shape", "position", "text"))
        if photos:
            over = [replace(scene, background=PHOTO) for scene in scenes]
            grounds = [fit(decode_image(photos[index % len(photos)].image), self.size_px) for index in range(len(over))]
            drawn = [
                compose(scene, ground, self.seed, "check", index) for index, (scene, ground) in enumerate(zip(over, grounds, strict=True))
            ]
            read = accuracy(over, [judge.read(picture) for picture in drawn])
            self.result.scores["judge_check/over_photos"] = _mean(read[name] for name in ("color", "shape", "position", "text"))

    def _judge_edits(self, judge: Judge, edits: Sequence[Edit]) -> None:
        edits = [
            replace(edit, references=[fit(image, self.size_px) for image in edit.references], target=fit(edit.target, self.size_px))
            for edit in edits
        ]
        successes: dict[str, list[bool]] = defaultdict(list)
        consistencies = []
        for index, (edit, result) in enumerate(zip(edits, self._draw_edits(edits), strict=True)):
            reading = judge.read(result)
            verdict = judge_edit(edit, result, reading)
            successes[edit.notes["operation"]].append(verdict.success)
            consistencies.append(verdict.consistency)
            found = asdict(verdict) | {"reading": asdict(reading)}
            self._record_edit(f"edits/{index:03d}", edit, result, found, shown=index < self.config.grid_prompts)
        if edits:
            self.result.scores["edit/success"] = _mean(value for values in successes.values() for value in values)
            self.result.scores["edit/consistency"] = _mean(consistencies)
            self.result.scores |= {f"edit_success/{operation}": _mean(values) for operation, values in sorted(successes.items())}

    def _draw_edits(self, edits: Sequence[Edit]) -> list[Image.Image]:
        requests = [
            Request(edit.instruction, index, (edit.target.height, edit.target.width), edit.references) for index, edit in enumerate(edits)
        ]
        return self._draw(requests, "edits drawn")

    def _draw(self, requests: Sequence[Request], what: str) -> list[Image.Image]:
        done = 0

        def count(num: int) -> None:
            nonlocal done
            done += num
            self._drawn += num
            self.context.progress.say(f"{done}/{len(requests)} {what}")

        return draw(self.painter, requests, on_drawn=count)

    def _record(
        self,
        group: str,
        prompt: Prompt,
        picture: Image.Image,
        *,
        reading: dict[str, Any] | None = None,
        original: Image.Image | None = None,
    ) -> None:
        index = sum(entry["group"] == group for entry in self.result.prompts)
        names = self._save(f"samples/{group}-{index:03d}", {"image": picture, "original": original})
        right = {name: (reading or {})[name] == value for name, value in prompt.asked.items()}
        entry = {"group": group, "text": prompt.text, "seed": prompt.seed, "asked": prompt.asked, "reading": reading, "right": right}
        self.result.prompts.append(entry | names | {"shown": index < self.config.grid_prompts})

    def _record_edit(self, name: str, edit: Edit, result: Image.Image, found: dict[str, Any], *, shown: bool) -> None:
        pictures = {"result": result, "target": edit.target} | {f"source{slot}": image for slot, image in enumerate(edit.references)}
        names = self._save(name, pictures)
        sources = [names.pop(f"source{slot}") for slot in range(len(edit.references))]
        entry = {"operation": edit.notes["operation"], "instruction": edit.instruction, "change": edit.notes["change"], "sources": sources}
        self.result.edits.append(entry | names | found | {"shown": shown})

    def _save(self, stem: str, pictures: dict[str, Image.Image | None] | dict[str, Image.Image]) -> dict[str, str]:
        """Writes `STEM-NAME.png` for each picture that is there; returns the paths by name."""
        names = {}
        for name, picture in pictures.items():
            if picture is not None:
                path = self.context.output / f"{stem}-{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
                names[name] = f"{stem}-{name}.png"
        return names

    def _fitted(self, picture: Image.Image) -> Image.Image:
        return fit(picture, bucket(picture.width, picture.height, self.resolution_px))


@dataclass(frozen=True)
class _Rows:
    """Held-out rows of one input, and what the whole input holds. `fallback`: nothing is held out, so any rows were taken."""

    rows: list[RawRow]
    operations: list[str]
    any_scene: bool
    fallback: bool


def _held_out_rows(folder: Folder, num: int, *, seed: int) -> _Rows:
    """A keyed choice of `num` held-out rows; where none is held out, of all rows."""
    ids: dict[bool, list[bytes]] = {True: [], False: []}
    operations: set[str] = set()
    any_scene = False
    for row in read_rows(folder, columns=("sample_id", "held_out", "operation", "annotation")):
        ids[row.held_out].append(row.sample_id)
        operations.add(row.operation)
        any_scene = any_scene or "shape" in row.notes()
    candidates = ids[True] or ids[False]
    order = keyed_generator(seed, "evaluated rows").permutation(len(candidates))[:num]
    chosen = {candidates[index] for index in order}
    rows = [row for row in read_rows(folder) if row.sample_id in chosen] if chosen else []
    return _Rows(rows, sorted(operations - {""}), any_scene, fallback=not ids[True])


def _read_hard(judge: Judge, group: str, picture: Image.Image, asked: dict[str, str]) -> dict[str, Any]:
    if group == "two_shapes":
        return read_two_shapes(judge, picture, asked)
    if group == "words":
        return {"word": read_word(picture)[0]}
    return asdict(judge.read(picture))


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
