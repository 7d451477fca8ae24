"""Parts of align_enhancer for tests: a tiny enhancer that keeps the schema in about half of its answers, and the step's inputs."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from model_core.context import StepContext
from model_core.models.enhancer import PromptEnhancer, save_enhancer, tiny_enhancer
from model_core.progress import Progress
from model_core.recipe import parse_recipe
from model_core.recipe_enhancer import Enhancer
from model_core.site import parse_site
from model_core.storage import open_storage
from model_core.tracking.spool import open_tracker
from model_core.training.checkpoint import CheckpointStore
from tests.alignment_parts import GRPO_SETTINGS, write_alignment_inputs
from tests.encoded_inputs import Input

CONFIG = Enhancer(hidden_size=32, num_layers=1, num_heads=2, vocab_size=400, max_new_tokens=40)
TINY = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 400, "max_new_tokens": 40}
IMAGE_ANSWERS = [f'<think>\nx\n</think>\n\n{{"prompt": "a general {word}", "aspect_ratio": "1:1"}}' for word in ("red", "blue")]
EDIT_ANSWERS = [f'<think>\nx\n</think>\n\n{{"prompt": "a longer {word}", "follow_image": 1}}' for word in ("red", "blue")]
BROKEN_ANSWERS = ["a general red", "a longer blue"]
REQUESTS = (
    ("a general 1", "a general 4 please", "draw me a general 0"),
    ("a red circle with text A7", "longer instruction than other one has", "x"),
)
SETTINGS: dict[str, Any] = {
    "updates": 4,
    "group_size": 4,
    "prompts_per_update": 4,
    "weights": {"brightness": 1.0, "text_constraints": 1.0},
    "edit_weights": {"brightness": 1.0, "text_constraints": 1.0},
    "edit_share": 0.5,
    "lr": 1e-3,
    "num_fixed": 2,
    "checkpoint_every_updates": 1,
}
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "sampling": {"steps": 2, "guidance_scale": 1.0},
    "mmdit": {"stages": {"S1": {"resolution_px": 64}}},
    "grpo": GRPO_SETTINGS,
    "enhancer": TINY,
}


@lru_cache(maxsize=1)
def supervised_enhancer(*, steps: int = 100) -> PromptEnhancer:
    """An enhancer that answers any request, half of the time with what breaks the schema."""
    model = tiny_enhancer(CONFIG, [*IMAGE_ANSWERS, *EDIT_ANSWERS, *BROKEN_ANSWERS], seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    pairs = [(0, IMAGE_ANSWERS), (1, EDIT_ANSWERS)]
    prompts, answers = [], []
    for num_images, valid in pairs:
        for request in REQUESTS[num_images]:
            for answer in (*valid, *BROKEN_ANSWERS):
                prompts.append(model.prompt_ids(request, num_images=num_images))
                answers.append(model.answer_ids(answer))
    for _ in range(steps):
        optimizer.zero_grad()
        (-torch.cat(model.log_probs(prompts, answers)).mean()).backward()
        optimizer.step()
    return model.eval()


def write_enhancer_inputs(root: Path) -> dict[str, Input]:
    """What align_enhancer takes."""
    inputs = write_alignment_inputs(root)
    generator = inputs.pop("model")
    save_enhancer(supervised_enhancer(), root / "supervised/enhancer")
    (root / "supervised/enhancer_card.json").write_text('{"valid": 0.5}\n')
    return inputs | {"generator": generator, "enhancer": Input(root / "supervised")}


def context_of(root: Path, inputs: dict[str, Input], *, output: str = "output", **settings: Any) -> StepContext:
    """The step's context; its checkpoints and output lie below `root`."""
    folder = root / output
    folder.mkdir(parents=True, exist_ok=True)
    storage = open_storage((root / "store").as_uri())
    return StepContext(
        recipe=parse_recipe(RECIPE | {"enhancer_grpo": SETTINGS | settings}, "recipe"),
        site=parse_site({"workspace": str(root)}, "site"),
        stage=None,
        run="test",
        key="0" * 16,
        inputs=inputs,  # type: ignore[arg-type]
        output=folder,
        scratch=root / "scratch",
        checkpoints=CheckpointStore(storage, "checkpoints", say=print, scratch=root / "scratch"),
        tracker=open_tracker(root / "spool", run="test", step="align_enhancer", stage=None, key="0" * 16, experiment="test"),
        progress=Progress("align_enhancer"),
    )


def document(context: StepContext) -> SimpleNamespace:
    """enhancement.json of a finished step."""
    return SimpleNamespace(**json.loads((context.output / "enhancement.json").read_text()))
