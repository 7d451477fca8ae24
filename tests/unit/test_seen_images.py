"""A stage whose encoder sees images and whose text is stored, from latents to pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from model_core.context import StepContext
from model_core.data.buckets import bucket
from model_core.documents import UserError
from model_core.evaluation.drawing import Request, draw
from model_core.manifest import Code
from model_core.progress import Progress
from model_core.recipe import Recipe, parse_recipe
from model_core.sampling.published import find_published
from model_core.site import Site
from model_core.steps import evaluate_model, register_model, train_mmdit
from model_core.steps.registry import STEPS
from model_core.storage import open_storage
from model_core.tracking.spool import open_tracker
from model_core.training.checkpoint import CheckpointStore
from model_core.workspace import Address, InputFolder, StepResult, Workspace
from tests.encoded_inputs import STAGE, write_inputs, write_stage

KEY = "0123456789abcdef"


def recipe(*, cache_states: bool) -> Recipe:
    stage = {**STAGE, "cache_states": cache_states, "steps": 2, "batch_size": 4, "edit_share": 0.5, "warmup_steps": 1, "lr": 1e-3}
    document = {
        "name": "tiny",
        "encoder": {"sees_images": True},
        "mmdit": {"model": {"num_layers": 1, "num_heads": 1, "head_dim": 16, "rope_axes": [4, 6, 6]}, "stages": {"S1": stage}},
        "sampling": {"steps": 1, "guidance_scale": 2.0},
        "evaluation": {"num_prompts": 2, "num_edits": 3, "num_reconstructions": 2, "grid_prompts": 2},
    }
    return parse_recipe(document, "recipe")


class Line:
    """A workspace in which steps are run one by one and committed."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self.root, self.recipe, self.site = root, recipe, Site(workspace=str(root))
        self.workspace = Workspace(self.site)
        self.made: dict[str, InputFolder] = {}

    def commit(self, name: str, step: str, fill: Callable[[Path], Any], *, stage: str | None = None) -> InputFolder:
        address, code = Address(step, stage, KEY), Code(version="0", git_sha=None, image_digest=None)
        with self.workspace.attempt(address, "0") as folder:
            stats = fill(folder)
            result = StepResult(stats=stats if isinstance(stats, dict) else {}, code=code)
            manifest = self.workspace.commit(
                address, folder, spec=STEPS[step], recipe=self.recipe, inputs={}, result=result, confirm=lambda: None
            )
        self.made[name] = InputFolder(manifest, site=self.site)
        return self.made[name]

    def run(self, name: str, module: Any, *, stage: str | None = None) -> InputFolder:
        step = module.__name__.rpartition(".")[2]
        spec, scratch = STEPS[step], self.root / "scratch"

        def fill(folder: Path) -> dict[str, Any]:
            context = StepContext(
                recipe=self.recipe,
                site=self.site,
                stage=stage,
                run="test",
                key=KEY,
                inputs={name: self.made[name] for name in spec.inputs},
                output=folder,
                scratch=scratch,
                checkpoints=CheckpointStore(open_storage((self.root / "kept").as_uri()), step, say=print, scratch=scratch),
                tracker=open_tracker(self.root / "spool", run="test", step=step, stage=stage, key=KEY, experiment="test"),
                progress=Progress(step),
            )
            return module.run(context)

        return self.commit(name, step, fill, stage=stage)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    """All that training needs, with everything stored."""
    return made_line(tmp_path_factory.mktemp("line"), recipe(cache_states=True), stored=True)


def made_line(root: Path, recipe: Recipe, *, stored: bool) -> Line:
    raw = root / "raw"
    raw.mkdir()
    inputs = write_inputs(raw)
    line = Line(root, recipe)
    copied = {"images": "ingest_images", "edits": "build_edits", "captions": "caption_images", "vae": "train_vae"}
    for name, step in (*copied.items(), ("encoder", "prepare_encoder")):
        source = inputs["encoder-True" if name == "encoder" else name].root
        line.commit(name, step, lambda folder, source=source: shutil.copytree(source, folder, dirs_exist_ok=True))
    given = {**inputs, "encoder-True": line.made["encoder"], "vae": line.made["vae"]}

    def encode(folder: Path) -> None:
        write_stage(given, folder, sees_images=True, cache_states=stored)  # type: ignore[arg-type]

    line.commit("latents", "encode_latents", encode, stage="S1")
    return line


@pytest.fixture(scope="module")
def trained(line: Line) -> Line:
    """After training without the vision-language model at hand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_mmdit, "load_encoder", lambda folder, **_: pytest.fail("the encoder is loaded"))
        line.run("model", train_mmdit, stage="S1")
    return line


def test_training_on_stored_states_alone_does_not_load_the_encoder(trained: Line) -> None:
    stats = trained.made["model"].manifest.stats
    assert (stats["steps"], stats["samples"], stats["missing_samples"]) == (2, 8, 0)
    assert {entry.path for entry in trained.made["model"].manifest.files} >= {"mmdit/model.safetensors", "ledger.json"}


def test_what_is_trained_is_evaluated_published_and_sampled_with_pictures(trained: Line) -> None:
    assert "photo_edit/psnr_gain" in trained.run("evaluation", evaluate_model).read_json("scores.json")
    published = trained.run("registration", register_model).manifest.uri
    reference = Image.new("RGB", (96, 64), "red")
    model = find_published(trained.site, published)
    assert bucket(96, 64, 64) == (48, 80)  # what an encoder without images would have
    assert model.size_px(None, [reference]) == (64, 96)
    with pytest.raises(UserError, match=r"found size 80x64; allowed are multiples of 32 pixels"):
        model.size_px((64, 80), [])
    painter = model.with_steps(1).load()
    (drawn,) = draw(painter, [Request("make it blue", 0, (64, 96), [reference])], on_drawn=lambda _: None)
    assert drawn.size == (96, 64)
    torch.nn.init.normal_(painter.mmdit.image_out.weight)  # two steps of training hardly move a pixel
    shown = [[Image.new("RGB", (64, 64), color)] for color in ("red", "red", "blue")]
    pictures = draw(painter, [Request("make it so", 0, (64, 64), images) for images in shown], on_drawn=lambda _: None)
    assert pictures[0].tobytes() == pictures[1].tobytes() != pictures[2].tobytes()


def test_a_stage_that_needs_stored_states_refuses_latents_without_them(tmp_path: Path) -> None:
    line = made_line(tmp_path, recipe(cache_states=True), stored=False)
    with pytest.raises(UserError, match=r"/image/.*found no text states of general, knowledge, structured, text; this stage trains on"):
        line.run("model", train_mmdit, stage="S1")


def test_a_stage_that_stores_edits_alone_loads_the_encoder_for_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = made_line(tmp_path, recipe(cache_states=False), stored=False)
    load, loaded = train_mmdit.load_encoder, []
    monkeypatch.setattr(train_mmdit, "load_encoder", lambda folder, **_: [loaded.append(folder), load(folder)][1])
    assert line.run("model", train_mmdit, stage="S1").manifest.stats["steps"] == 2
    assert len(loaded) == 1
