"""`darkroom sample`: prompts, and pictures to edit, to PNG files that say how they were drawn."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from model_core.documents import UserError
from model_core.site import Site
from pipelines.picture_requests import PictureRequest

if TYPE_CHECKING:
    from model_core.evaluation.drawing import Painter
    from model_core.sampling.published import PublishedModel

Say = Callable[[str], object]


@dataclass(frozen=True)
class Picture:
    """A PNG file and all that it depends on. `size` is (width, height); None, before anything is drawn, leaves it to the enhancer."""

    path: str
    prompt: str
    enhanced: str | None
    seed: int
    size: tuple[int, int] | None
    model: str
    model_digest: str
    sampler: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The same for a script."""
        return asdict(self)

    def to_text(self, *, would: bool) -> str:
        """The same for people; `would` says that it is only planned."""
        enhanced = "" if self.enhanced is None else f"\nenhanced: {self.enhanced}"
        if not would:
            return f"wrote {self.path}{enhanced}"
        size = "a size that the enhanced prompt asks for" if self.size is None else "x".join(map(str, self.size))
        return f"would write {self.path}: {self.prompt!r}, seed {self.seed}, {size}, {self.sampler['steps']} steps"

    def metadata(self) -> dict[str, str]:
        """Text chunks of the file, by keyword."""
        enhanced = {} if self.enhanced is None else {"enhanced_prompt": self.enhanced}
        return {
            "prompt": self.prompt,
            **enhanced,
            "seed": str(self.seed),
            "model": self.model,
            "model_digest": self.model_digest,
            "sampler": json.dumps(self.sampler, sort_keys=True),
            "software": f"darkroom {version('darkroom')}",
        }


def find_model(site: Site, model: str, *, student: bool, steps: int | None, enhance: bool) -> PublishedModel:
    """The model as it is to be sampled, nothing loaded; raises UserError where it has not what was asked for."""
    from model_core.sampling.published import find_published

    published = find_published(site, model)
    if student:
        published = published.student()
    if steps is not None:
        published = published.with_steps(steps)
    if enhance:
        published.check_enhancer()
    return published


def plan(published: PublishedModel, requests: Sequence[PictureRequest], *, enhance: bool) -> list[Picture]:
    """What would be drawn, before any model is loaded; raises UserError for a size that the model cannot draw."""
    sizes = [published.size_px(request.size_px, request.references) for request in requests]
    return [
        Picture(
            path=str(request.path),
            prompt=request.prompt,
            enhanced=None,
            seed=request.seed,
            size=None if enhance and request.size_px is None else (width, height),
            model=published.name,
            model_digest=published.digest,
            sampler=sampler_of(published, (height, width)),
        )
        for request, (height, width) in zip(requests, sizes, strict=True)
    ]


def draw(published: PublishedModel, requests: Sequence[PictureRequest], *, enhance: bool, say: Say) -> Iterator[Picture]:
    """Draws and writes the pictures, those of one size together, and tells of each when it is written.

    With `enhance` each prompt is rewritten first, by the likeliest answer; `say` hears of answers that are not valid, and how far
    the drawing is. Raises UserError for a mistake before any model is loaded.
    """
    pictures = plan(published, requests, enhance=enhance)
    from model_core.evaluation.drawing import Request, draw_batches
    from model_core.training.distributed import compute_device, keep_deterministic

    keep_deterministic(compute_device())
    painter = published.load()
    if enhance:
        pictures = _enhanced(published, painter, requests, pictures, say)
    wanted = [
        Request(picture.enhanced or picture.prompt, request.seed, _height_width(picture), request.references)
        for request, picture in zip(requests, pictures, strict=True)
    ]
    num_drawn = 0
    for batch in draw_batches(painter, wanted):
        for index, image in batch.items():
            write_png(image, pictures[index])
            yield pictures[index]
        num_drawn += len(batch)
        if len(requests) > 1:
            say(f"{num_drawn}/{len(requests)} pictures")


def _enhanced(
    published: PublishedModel, painter: Painter, requests: Sequence[PictureRequest], pictures: Sequence[Picture], say: Say
) -> list[Picture]:
    """The pictures with the enhancer's prompts, and the sizes and samplers that follow from them."""
    from model_core.sampling.enhancing import enhance

    texts, num_images = [request.prompt for request in requests], [len(request.references) for request in requests]
    changed = []
    answers = enhance(published.load_enhancer(), texts, num_images=num_images, reads=painter.encoder.reads)
    for request, picture, answer in zip(requests, pictures, answers, strict=True):
        if answer.fallback:
            say(f"note: {request.prompt!r} is drawn in its own words, since the enhancer's answer is not valid: {answer.fallback}")
        height, width = published.size_px(request.size_px, request.references, enhanced=answer)
        changed.append(
            replace(
                picture,
                enhanced=None if answer.fallback else answer.prompt,
                size=(width, height),
                sampler=sampler_of(published, (height, width)),
            )
        )
    return changed


def sampler_of(published: PublishedModel, size_px: tuple[int, int]) -> dict[str, Any]:
    """How a picture of (height, width) is sampled: a flow's steps and guidance, or a student's steps and their times."""
    from model_core.recipe import CompressionRatio, Sampling

    if isinstance(published.sampling, Sampling):
        return published.sampling.model_dump(mode="json")
    tokens = (size_px[0] // CompressionRatio) * (size_px[1] // CompressionRatio)
    return {"student": True, "steps": published.sampling.steps, "times": published.sampling.times(tokens)}


def write_png(image: Image.Image, picture: Picture) -> None:
    """Writes the picture with its metadata; raises UserError where that cannot be."""
    chunks = PngInfo()
    for keyword, text in picture.metadata().items():
        chunks.add_text(keyword, text)  # becomes an iTXt chunk where Latin-1 cannot tell it
    data = io.BytesIO()
    image.save(data, format="PNG", pnginfo=chunks)
    path = Path(picture.path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.getvalue())
    except OSError as error:
        raise UserError(f"sample: --out: {path} cannot be written ({error.strerror or error})") from error


def _height_width(picture: Picture) -> tuple[int, int]:
    assert picture.size is not None, "sizes are known once prompts are enhanced"
    width, height = picture.size
    return height, width
