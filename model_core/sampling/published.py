"""A published model to draw with: found by run, manifest or folder, proved by digest, loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from model_core.data.buckets import bucket
from model_core.data.enhanced_prompt import EnhancedPrompt
from model_core.documents import UserError
from model_core.evaluation.drawing import Painter, open_painter
from model_core.models.condition import multiple_px, sees_images
from model_core.models.enhancer import PromptEnhancer, load_enhancer
from model_core.recipe import Sampling
from model_core.results import find_result
from model_core.sampling.few_step import FILE_NAME, FewStep, load_sampler
from model_core.site import Site
from model_core.training.distributed import compute_device
from model_core.workspace import Address, InputFolder, Workspace

STEP = "register_model"


@dataclass(frozen=True)
class PublishedModel:
    """The parts of a model, not loaded yet, how it is sampled, and the side of the pictures that it was last trained on.

    `name` is what it was asked for by; `transformer` is the part that draws, "mmdit" or "student".
    """

    name: str
    parts: Mapping[str, InputFolder]
    sampling: Sampling | FewStep
    resolution_px: int
    transformer: str = "mmdit"

    @property
    def digest(self) -> str:
        """The content digest of the weights that draw."""
        return self.parts[self.transformer].manifest.content_digest

    @property
    def multiple_px(self) -> int:
        """What the sides of its pictures must be multiples of."""
        return multiple_px(sees_images=sees_images(self.parts["encoder"]))

    def student(self) -> PublishedModel:
        """The same model drawn by its few-step student; raises UserError where none was registered."""
        if "student" not in self.parts:
            raise UserError(f"model {self.name}: it has no few-step student; allowed is a model of a recipe that distils one (dmd)")
        sampler = load_sampler(self.parts["student"].path(f"mmdit/{FILE_NAME}").parent)
        assert sampler is not None, "its manifest holds the sampler"
        return replace(self, sampling=sampler, transformer="student")

    def with_steps(self, steps: int) -> PublishedModel:
        """The same model sampled in so many steps; raises UserError where a student has others, which it was distilled for."""
        if isinstance(self.sampling, Sampling):
            return replace(self, sampling=self.sampling.model_copy(update={"steps": steps}))
        if steps != self.sampling.steps:
            raise UserError(f"model {self.name}: found {steps} steps; allowed for its student are {self.sampling.steps}, its own grid")
        return self

    def size_px(
        self, asked: tuple[int, int] | None, references: Sequence[Image.Image], *, enhanced: EnhancedPrompt | None = None
    ) -> tuple[int, int]:
        """(height, width) of a picture: the size that was asked for, else the model's resolution in the shape that fits.

        That is the enhanced prompt's, where there is one; else the last reference's, or a square. Raises UserError for a size that
        the model cannot draw.
        """
        if asked is not None:
            if any(side % self.multiple_px for side in asked):
                height, width = asked
                raise UserError(f"model {self.name}: found size {width}x{height}; allowed are multiples of {self.multiple_px} pixels")
            return asked
        width, height = references[-1].size if references else (1, 1)
        if enhanced is not None and not enhanced.fallback:
            if enhanced.follow_image is not None:
                width, height = references[enhanced.follow_image - 1].size
            elif enhanced.aspect_ratio is not None:
                width, height = map(int, enhanced.aspect_ratio.split(":"))
        return bucket(width, height, self.resolution_px, multiple_px=self.multiple_px)

    def load(self) -> Painter:
        """The model, ready to draw."""
        return open_painter(
            mmdit=self.parts[self.transformer].folder("mmdit"),
            vae=self.parts["vae"].folder("vae"),
            encoder=self.parts["encoder"].folder("encoder"),
            sampling=self.sampling if isinstance(self.sampling, Sampling) else Sampling(),
        )

    def load_enhancer(self) -> PromptEnhancer:
        """Its Prompt Enhancer, ready to answer; raises UserError as `check_enhancer` does."""
        self.check_enhancer()
        return load_enhancer(self.parts["enhancer"].folder("enhancer")).to(compute_device())

    def check_enhancer(self) -> None:
        """Raises UserError where no Prompt Enhancer was registered."""
        if "enhancer" not in self.parts:
            raise UserError(f"model {self.name}: it has no Prompt Enhancer; allowed is a model of a recipe that trains one (enhancer)")


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
    return PublishedModel(model, parts, Sampling.model_validate(document["sampling"]), document["resolution_px"])
