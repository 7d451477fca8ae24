"""Parts of reinforcement learning for tests: a tiny policy over tiny inputs, scorers that are right or broken, and the step itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from model_core.context import StepContext
from model_core.data.prompts import PolicyPrompt, read_prompts
from model_core.models.condition import load_encoder
from model_core.models.mmdit import MMDiT, save_mmdit
from model_core.models.vae import load_vae
from model_core.progress import Progress
from model_core.recipe import GRPO, MMDiTModel, Sampling, parse_recipe
from model_core.rewards.verdict import Score, ScoreRequest, Value
from model_core.site import parse_site
from model_core.storage import open_storage
from model_core.tracking.spool import open_tracker
from model_core.training.checkpoint import CheckpointStore
from model_core.training.distributed import ALONE, Ranks
from model_core.training.rollouts import Artist
from tests.encoded_inputs import Input, write_inputs

MODEL = MMDiTModel(
    num_layers=2,
    num_heads=2,
    head_dim=8,
    rope_axes=(2, 4, 2),
    attention="block_causal",
    condition_at_t0=True,
    rope_positions="running",
)
WEIGHTS = {"default": {"brightness": 1.0}}
GRPO_SETTINGS: dict[str, Any] = {
    "updates": 4,
    "rollout_steps": 4,
    "window_range": [0, 3],
    "group_size": 4,
    "prompts_per_update": 4,
    "groups_a_chunk": 2,
    "micro_batch": 6,
    "lr": 1e-3,
    "num_fixed": 2,
    "checkpoint_every_updates": 1,
    "schedule": [{"weights": WEIGHTS, "edit_share": 0.5}],
}
DMD_SETTINGS: dict[str, Any] = {
    "student_steps": 3,
    "teacher_weights": [{"base": 1.0}, {"base": 0.5, "aligned": 0.5}, {"aligned": 1.0}],
    "iterations": 6,
    "ttur": 2,
    "batch_size": 4,
    "samples_a_chunk": 2,
    "lr": 1e-3,
    "critic_lr": 1e-3,
    "num_fixed": 2,
    "log_every_iterations": 1,
    "checkpoint_every_iterations": 1,
}
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "sampling": {"steps": 2, "guidance_scale": 3.0},
    "mmdit": {"stages": {"S1": {"resolution_px": 64}}},
}


class Scores:
    """A scorer of one reward, or of a gold one beside it, that are functions of a picture's mean brightness (0 to 1)."""

    def __init__(self, reward: Callable[[float], float] = lambda value: value, gold: Callable[[float], float] | None = None) -> None:
        self._rewards = {"brightness": reward} | ({"gold": gold} if gold else {})

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._rewards)

    def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
        found = [float(np.asarray(request.image, dtype=np.float64).mean() / 255) for request in requests]
        return [{name: Value(reward(value)) for name, reward in self._rewards.items()} for value in found]


def policy(*, latent_channels: int = 4, text_dim: int = 32) -> MMDiT:
    """A tiny transformer whose velocities are not zero."""
    torch.manual_seed(0)
    model = MMDiT(MODEL, latent_channels=latent_channels, text_dim=text_dim)
    torch.nn.init.normal_(model.image_out.weight, std=0.3)
    torch.nn.init.normal_(model.final_scale.weight, std=0.1)
    return model


def write_alignment_inputs(root: Path) -> dict[str, Input]:
    """What align_grpo takes: the tiny policy beside six pictures and five edits."""
    inputs = write_inputs(root)
    save_mmdit(policy(), root / "model/mmdit")
    (root / "model/history.json").write_text("[]\n")
    names = ("vae", "captions", "images", "edits")
    return {name: inputs[name] for name in names} | {"model": Input(root / "model"), "encoder": inputs["encoder-False"]}


def artist_of(inputs: dict[str, Input], *, guidance_scale: float = 3.0, **grpo: Any) -> Artist:
    """What the policy draws with."""
    config = GRPO.model_validate(GRPO_SETTINGS | grpo)
    sampling = Sampling(steps=2, guidance_scale=guidance_scale)
    vae, encoder = load_vae(inputs["vae"].folder("vae")), load_encoder(inputs["encoder"].folder("encoder"))
    return Artist(vae=vae, encoder=encoder, sampling=sampling, config=config, seed=0, policy="policy")


def prompts_of(inputs: dict[str, Input]) -> dict[str, list[PolicyPrompt]]:
    """The prompts of the tiny inputs."""
    return read_prompts(inputs["images"], inputs["edits"], inputs["captions"], resolution_px=64, multiple_px=16, seed=0)  # type: ignore[arg-type]


def context_of(
    root: Path,
    inputs: dict[str, Input],
    *,
    ranks: Ranks = ALONE,
    output: str = "output",
    dmd: dict[str, Any] | None = None,
    **grpo: Any,
) -> StepContext:
    """The step's context, with settings of `grpo` and of `dmd` beside the tiny ones; its checkpoints and output lie below `root`."""
    folder = root / f"{output}-{ranks.rank}"
    folder.mkdir(parents=True, exist_ok=True)
    storage = open_storage((root / "store").as_uri())
    return StepContext(
        recipe=parse_recipe(RECIPE | {"grpo": GRPO_SETTINGS | grpo, "dmd": DMD_SETTINGS | (dmd or {})}, "recipe"),
        site=parse_site({"workspace": str(root)}, "site"),
        stage=None,
        run="test",
        key="0" * 16,
        inputs=inputs,  # type: ignore[arg-type]
        output=folder,
        scratch=root / "scratch",
        checkpoints=CheckpointStore(storage, "checkpoints", say=print, scratch=root / "scratch", ranks=ranks),
        tracker=open_tracker(root / "spool", run="test", step="align_grpo", stage=None, key="0" * 16, experiment="test"),
        progress=Progress("align_grpo"),
        ranks=ranks,
    )


def document(context: StepContext) -> SimpleNamespace:
    """alignment.json of a finished step."""
    return SimpleNamespace(**json.loads((context.output / "alignment.json").read_text()))
