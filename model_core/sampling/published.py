"""Pictures from a published model: found by run, manifest or folder, proved by digest, loaded and sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from model_core.data.buckets import bucket
from model_core.documents import UserError
from model_core.evaluation.drawing import Painter, Request, draw, open_painter
from model_core.models.condition import multiple_px, sees_images
from model_core.recipe import Sampling
from model_core.results import find_result
from model_core.site import Site
from model_core.workspace import Address, InputFolder, Workspace

STEP = "register_model"


@dataclass(frozen=True)
class PublishedModel:
    """The parts of a model, not loaded yet, how it is sampled, and the side of the pictures that it was last trained on."""

    parts: Mapping[str, InputFolder]
    sampling: Sampling
    resolution_px: int

    @property
    def multiple_px(self) -> int:
        """What the sides of its pictures must be multiples of."""
        return multiple_px(sees_images=sees_images(self.parts["encoder"]))

    def load(self) -> Painter:
        """The model, ready to draw."""
        return open_painter(
            mmdit=self.parts["mmdit"].folder("mmdit"),
            vae=self.parts["vae"].folder("vae"),
            encoder=self.parts["encoder"].folder("encoder"),
            sampling=self.sampling,
        )


def sample_published(
    site: Site,
    model: str,
    prompts: Sequence[str],
    *,
    references: Sequence[Image.Image],
    seed: int,
    steps: int | None,
    size_px: tuple[int, int] | None,
) -> list[Image.Image]:
    """One picture a prompt, all with the same seed and references. `size_px` is (height, width); None takes the model's
    resolution, in the aspect ratio of the last reference where there is one. Raises UserError, before any weights are loaded,
    for a model that is not there or a size that it cannot draw.
    """
    published = find_published(site, model)
    if size_px is None:
        width, height = references[-1].size if references else (1, 1)
        size_px = bucket(width, height, published.resolution_px, multiple_px=published.multiple_px)
    elif any(side % published.multiple_px for side in size_px):
        height, width = size_px
        raise UserError(f"model {model}: found size {width}x{height}; allowed are multiples of {published.multiple_px} pixels")
    if steps is not None:
        published = replace(published, sampling=published.sampling.model_copy(update={"steps": steps}))
    requests = [Request(prompt, seed, size_px, references) for prompt in prompts]
    return draw(published.load(), requests, on_drawn=lambda _: None)


def find_published(site: Site, model: str) -> PublishedModel:
    """Finds what register_model published. `model` is a run's name, or the path or uri of a manifest or its folder.

    Raises UserError when there is no such model, or a part is missing or not the one that was registered.
    """
    workspace = Workspace(site)
    manifest = find_result(workspace, model, step=STEP, what="model", missing="this run has not registered a model yet")
    registered = InputFolder(manifest, site=site)
    document = registered.read_json("model.json")
    # A manifest from elsewhere brings its own workspace: its parts lie beside it.
    root = manifest.uri.removesuffix(f"/{manifest.step}/{manifest.key}")
    beside = workspace if root == workspace.uri else Workspace(site.model_copy(update={"workspace": root}))
    parts = {}
    for name, part in document["parts"].items():
        found = beside.find(Address(part["step"], part["stage"], part["key"]))
        if found is None or found.content_digest != part["content_digest"]:
            problem = "is missing" if found is None else "is not the one that was registered"
            raise UserError(f"model {model}: its part {name}, {beside.uri}/{part['step']}/{part['key']}, {problem}")
        parts[name] = InputFolder(found, site=site)
    return PublishedModel(parts, Sampling.model_validate(document["sampling"]), document["resolution_px"])
