"""Where rewards come from: the service that the site or the launcher names, else scorers in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from model_core.documents import UserError
from model_core.manifest import Manifest
from model_core.recipe import DIMENSIONS, Recipe, Scenes
from model_core.recipe_enhancer import CONSTRAINTS
from model_core.rewards.attribute_check import AttributeCheck
from model_core.rewards.client import HTTPScorer
from model_core.rewards.combined import CombinedScorer
from model_core.rewards.edit_consistency import INSTRUCTION, EditConsistency
from model_core.rewards.edit_consistency import NAME as CONSISTENCY
from model_core.rewards.face_gate import PORTRAIT, FaceGated, check_face_finder, open_face_finder
from model_core.rewards.text_accuracy import NAME as TEXT_ACCURACY
from model_core.rewards.text_accuracy import TextAccuracy, check_reader, open_reader, reader_is_installed
from model_core.rewards.verdict import Scorer
from model_core.site import Site
from model_core.workspace import InputFolder

URI_VARIABLE = "DARKROOM_REWARDS_URI"  # set by the launcher for a service that it has started beside the step


def open_scorer(site: Site, rewards: Sequence[str], *, local: Callable[[], Sequence[Scorer]], say: Callable[[str], None]) -> Scorer:
    """A scorer that gives just `rewards`: of the service at DARKROOM_REWARDS_URI or the site's rewards.uri, else of `local()`.

    Raises UserError for a reward that no local scorer gives, or two do; a service's are told by its first answer.
    """
    uri = os.environ.get(URI_VARIABLE) or site.rewards.uri
    if uri is None:
        return CombinedScorer(local(), rewards=rewards)
    settings = site.rewards
    return HTTPScorer(uri, rewards, timeout_seconds=settings.timeout_seconds, patience_seconds=settings.patience_seconds, say=say)


def check_rewards(recipe: Recipe, site: Site) -> None:
    """Raises UserError for a reward of grpo or enhancer_grpo that nothing gives, or whose package is not installed.

    A service at the site's rewards.uri knows its own.
    """
    if site.rewards.uri is not None:
        return
    known = (*DIMENSIONS, CONSISTENCY, TEXT_ACCURACY, *AttributeCheck.names)
    asked = {
        "grpo": ((), recipe.grpo.rewards if recipe.grpo else ()),
        "enhancer_grpo": ((CONSTRAINTS,), recipe.enhancer_grpo.rewards if recipe.enhancer_grpo else ()),
    }
    for field, (own, rewards) in asked.items():
        unknown = [name for name in rewards if name not in (*known, *own)]
        if unknown:
            allowed = ", ".join((*own, *known))
            raise UserError(f"recipe {recipe.name}: {field}: found the rewards {', '.join(unknown)}; allowed are {allowed}")
        if PORTRAIT in rewards:
            check_face_finder()
        if TEXT_ACCURACY in rewards:
            check_reader()


def model_scorers(rewards: Sequence[str], inputs: Mapping[str, InputFolder], *, scenes: Scenes) -> list[Scorer]:
    """Local scorers with the reward models among a step's inputs that `rewards` need. Raises UserError for a model that is not there."""
    needed = [name for name in DIMENSIONS if name in rewards or (name == INSTRUCTION and CONSISTENCY in rewards)]
    missing = [name for name in needed if name not in inputs]
    if missing:
        raise UserError(f"rewards: found no reward model of {', '.join(missing)} among the inputs; allowed are those that there are")
    return local_scorers(rewards, scenes=scenes, models=[_open_model(inputs[name]) for name in needed])


def _open_model(result: InputFolder) -> Scorer:
    from model_core.models.reward import load_reward  # rules alone need no trunk
    from model_core.models.reward_scorer import RewardScorer
    from model_core.training.distributed import compute_device

    return RewardScorer(load_reward(result.folder("reward")).to(compute_device()))


def local_scorers(rewards: Sequence[str], *, scenes: Scenes, models: Sequence[Scorer]) -> list[Scorer]:
    """The reward models, portraits gated and edits' consistency beside instructions, and the rules that `rewards` names.

    Raises UserError when a reward needs a package that is not installed.
    """
    scorers: list[Scorer] = []
    for model in models:
        if PORTRAIT in model.names:
            model = FaceGated(model, has_face=open_face_finder())
        if INSTRUCTION in model.names:
            model = EditConsistency(model)
        scorers.append(model)
    if TEXT_ACCURACY in rewards:
        scorers.append(TextAccuracy(open_reader()))
    return [*scorers, AttributeCheck(scenes)]


def served_scorer(recipe: Recipe, site: Site, inputs: Mapping[str, Manifest]) -> Scorer:
    """What the service gives: the rewards of the recipe's grpo, or where it has none the rules.

    `inputs` are those of align_grpo; others than reward models are not read. Raises UserError for a reward model that is not there.
    """
    models = {name: InputFolder(manifest, site=site) for name, manifest in inputs.items() if manifest.step == "train_reward"}
    rules = (*AttributeCheck.names, *([TEXT_ACCURACY] if reader_is_installed() else []))
    rewards = rules if recipe.grpo is None else recipe.grpo.rewards
    return CombinedScorer(model_scorers(rewards, models, scenes=recipe.data.scenes), rewards=rewards)
