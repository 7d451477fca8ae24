"""The report of a run: one HTML file for people, which needs no network and no scripts, and `report.json` for programs."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from model_core.evaluation.charts import line_chart
from model_core.manifest import FILE_NAME, parse_manifest
from model_core.run_record import RunRecord, StepRecord, read_run, read_steps
from model_core.workspace import Workspace

BODY, PAGE = "body.json", "report.html"
ALIGNMENT = "alignment.json"  # of an aligned model: every update, and what was compared before and after
DISTILLATION = "distillation.json"  # of a student: the curves, and what was compared with its teacher
ENHANCEMENT = "enhancement.json"  # of an aligned Prompt Enhancer: every update, and what was compared
# Of a body, and the files they are.
SECTIONS = {"alignment": ALIGNMENT, "distillation": DISTILLATION, "enhancer": "enhancer_card.json", "enhancement": ENHANCEMENT}
GOALS = {"judge/mean": 0.80, "edit/success": 0.60, "vae/psnr": 26.0}  # what the demo is to reach
MAX_INLINE_BYTES = 60_000  # larger pictures go into the page as JPEG
JPEG_QUALITY = 88
MAX_PIXELATED_PX = 160  # smaller pictures are shown with their pixels sharp

TILES = (  # score, title, what it says
    ("judge/mean", "prompts", "of what held-out prompts ask for is in the picture"),
    ("edit/success", "edits", "of the asked changes are made"),
    ("edit/consistency", "consistency", "of what an edit should leave alone stays"),
    ("vae/psnr", "reconstruction", "PSNR of held-out pictures after the autoencoder"),
    ("vae/ssim", "structure", "SSIM of held-out pictures after the autoencoder"),
    ("photo_edit/psnr_gain", "photo edits", "nearer to the target than the source was"),
)
GROUPS = {  # of prompts: title, what to know
    "two_shapes": ("Two shapes", "Training never shows more than one."),
    "words": ("Words", "Training scenes carry a letter and a digit; here a word of four letters is asked for."),
    "photo_scenes": ("Scenes over photographs", "The judge itself is less sure over photographs: see judge_check/over_photos."),
}


@dataclass(frozen=True)
class RunView:
    """What a page says about the run, beside its results."""

    record: RunRecord
    steps: list[StepRecord]
    funnels: list[dict[str, Any]]

    @property
    def status(self) -> str:
        """failed when a step has failed, running while one is at work or the last has not come, else done."""
        states = {step.status for step in self.steps}
        if "failed" in states:
            return "failed"
        return "done" if any(step.step == "publish_report" and step.status == "done" for step in self.steps) else "running"


def write_report(run: str, workspace: Workspace) -> str:
    """Writes `reports/<run>/report.html` and `report.json`; returns the page's uri. A run that failed half-way has a report too.

    Raises UserError for a run that the workspace does not hold.
    """
    storage = workspace.storage
    record, steps = read_run(storage, run), read_steps(storage, run)
    done = [step for step in steps if step.status == "done"]
    folder = next((f"{step.step}/{step.key}" for step in done if step.step == "publish_report"), None)
    body: dict[str, Any] | None = json.loads(storage.get(f"{folder}/{BODY}")) if folder else None
    funnels = [
        {"stage": step.stage, "steps": json.loads(storage.get(f"{step.step}/{step.key}/funnel.json"))}
        for step in done
        if step.step == "filter_images"
    ]
    warnings = []
    for step in done:
        stats = parse_manifest(storage.get(f"{step.step}/{step.key}/{FILE_NAME}"), step.uri).stats
        warnings += [f"{step.label}: {warning}" for warning in stats.get("warnings", [])]
    failures = [f"{step.label} failed: {step.error}" for step in steps if step.status == "failed"]

    kept = ("step", "stage", "key", "status", "seconds", "reused", "uri")
    document = {
        "run": run,
        "recipe": record.recipe["name"],
        "recipe_digest": record.recipe_digest,
        "steps": [{name: asdict(step)[name] for name in kept} for step in steps],
        "metrics": body["scores"] if body else {},
        "images": [f"{folder}/{name}" for name in pictures_of(body)] if body else [],
        "warnings": warnings + failures,
    }
    view = RunView(record, steps, funnels)
    page = render_page(body, run=view, warnings=warnings, read=lambda name: storage.get(f"{folder}/{name}"))
    storage.put(f"reports/{run}/{PAGE}", page.encode())
    storage.put(f"reports/{run}/report.json", (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())
    return f"{storage.uri}/reports/{run}/{PAGE}"


def pictures_of(body: dict[str, Any]) -> list[str]:
    """Paths of all pictures that a body names, in the order in which it names them."""

    def found() -> Iterator[str]:
        for entry in body["prompts"]:
            yield from (entry[name] for name in ("image", "original") if name in entry)
        for entry in body["edits"]:
            yield from (*entry["sources"], entry["result"], entry["target"])
        for entry in body["reconstructions"]:
            yield from (entry["original"], entry["decoded"])
        for section in SECTIONS:
            for entry in body.get(section, {}).get("shown", []):
                yield from entry["pictures"].values()

    return list(dict.fromkeys(found()))


def render_page(
    body: dict[str, Any] | None, *, read: Callable[[str], bytes], run: RunView | None = None, warnings: list[str] | None = None
) -> str:
    """The page as one HTML document; `read` gives the bytes of a picture.

    Without `run` it tells of results only, without `body` of the run only. All text is escaped.
    """
    environment = Environment(
        loader=PackageLoader("model_core.evaluation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "score": _score,
        "duration": _duration,
        "yaml": lambda value: yaml.safe_dump(value, sort_keys=False, allow_unicode=True),
    }
    return environment.get_template("report.html").render(
        body=body,
        run=run,
        warnings=warnings if warnings is not None else (body or {}).get("warnings", []),
        tiles=_tiles(body["scores"]) if body else [],
        groups=GROUPS,
        picture=lambda name: _inline(read(name)),
        charts=_charts(body["curves"]) if body else [],
        student_charts=student_charts(body["distillation"]["points"]) if body and "distillation" in body else [],
        reward_charts=reward_charts(body["alignment"]["points"], gold=body["alignment"]["gold"]) if body and "alignment" in body else [],
        longest=max([step.seconds for step in run.steps if not step.reused], default=0.0) if run else 0.0,
    )


def _tiles(scores: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "title": title,
            "about": about,
            "value": _score(scores[name], name),
            "goal": GOALS.get(name),
            "met": scores[name] >= GOALS.get(name, 0),
        }
        for name, title, about in TILES
        if name in scores
    ]


def _charts(curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Title, SVG and last loss of each curve."""
    charts = []
    for curve in curves:
        points = [(float(point["step"]), float(point["loss"])) for point in curve["points"]]
        if points:
            svg = Markup(line_chart(points, label="loss by optimizer step"))
            charts.append({"title": curve["title"], "svg": svg, "last": points[-1][1], "steps": int(points[-1][0])})
    return charts


def reward_charts(points: list[dict[str, Any]], *, gold: str | None) -> list[dict[str, Any]]:
    """Title, SVG and last value of each reward's mean by update: the total, the gold one, then each by itself."""
    names = sorted({name for point in points for name in point if name.startswith("reward/") and name != f"reward/{gold}"})
    titles = {"reward": "training reward", "gold": f"{gold}, never trained on"} | {name: name.removeprefix("reward/") for name in names}
    charts = []
    for name, title in titles.items():
        known = [(float(point["update"] + 1), float(point[name])) for point in points if name in point]
        if known:
            svg = Markup(line_chart(known, label=f"{title} by update"))
            charts.append({"title": title.replace("_", " "), "svg": svg, "last": known[-1][1], "steps": int(known[-1][0])})
    return charts


def student_charts(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Title, SVG and last value by iteration of what tells whether a distillation is well: errors, gradients and brightness, not losses."""
    titles = {
        "critic_error/t0": "fake score's error near the picture",
        "critic_error/t3": "fake score's error near noise",
        "student_grad_norm": "student's gradient norm",
        "picture_mean": "mean brightness of the student's pictures",
        "picture_std": "spread of the student's pictures",
    }
    charts = []
    for name, title in titles.items():
        known = [(float(point["iteration"]), float(point[name])) for point in points if name in point]
        if known:
            svg = Markup(line_chart(known, label=f"{title} by iteration"))
            charts.append({"title": title, "svg": svg, "last": known[-1][1], "steps": int(known[-1][0])})
    return charts


def _score(value: float, name: str) -> str:
    """A score in the unit that its name implies."""
    if name.endswith(("psnr", "psnr_gain")):
        return f"{value:+.1f} dB" if name.endswith("gain") else f"{value:.1f} dB"
    if name.startswith("val_loss") or name == "vae/ssim":
        return f"{value:.3f}"
    return f"{100 * value:.0f} %"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _inline(data: bytes) -> dict[str, Any]:
    """A picture as a data URI with its size."""
    picture = Image.open(io.BytesIO(data))
    media = "image/png"
    if len(data) > MAX_INLINE_BYTES:
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY)
        data, media = buffer.getvalue(), "image/jpeg"
    return {
        "uri": f"data:{media};base64,{base64.b64encode(data).decode()}",
        "width": picture.width,
        "height": picture.height,
        "pixelated": max(picture.size) <= MAX_PIXELATED_PX,
    }
