"""The training DAG, written once: raw images to a registered model and its report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent

from components.align_enhancer import align_enhancer
from components.align_grpo import align_grpo
from components.build_edits import build_edits
from components.build_preferences import build_preferences
from components.caption_images import caption_images
from components.distill_dmd import distill_dmd
from components.encode_latents import encode_latents
from components.evaluate_model import evaluate_model
from components.filter_images import filter_images
from components.ingest_images import ingest_images
from components.prepare_encoder import prepare_encoder
from components.publish_report import publish_report
from components.register_model import register_model
from components.render_text import render_text
from components.train_enhancer import train_enhancer
from components.train_mmdit import train_mmdit
from components.train_reward import train_reward
from components.train_vae import train_vae
from model_core.recipe import DIMENSIONS, Recipe

NAME = "darkroom-training"


@dataclass(frozen=True)
class Sections:
    """Which optional sections a recipe has, and so which branches the DAG: rewards and GRPO, a few-step student, the Prompt Enhancer."""

    grpo: bool
    dmd: bool
    enhancer: bool
    enhancer_grpo: bool

    @classmethod
    def of(cls, recipe: Recipe) -> "Sections":
        """Those of a recipe."""
        parts = (recipe.grpo, recipe.dmd, recipe.enhancer, recipe.enhancer_grpo)
        return cls(*(part is not None for part in parts))


def training_pipeline(stages: Sequence[str], sections: Sections, *, image: str) -> GraphComponent:
    """The DAG for a curriculum of `stages` and a recipe's `sections`, every step in `image`, as a compiled Kubeflow pipeline.

    Its shape depends on these alone. The recipe and the site are arguments of a run, so a changed learning rate
    makes no new pipeline version; they travel as JSON text, since Kubeflow's own mappings (protobuf Struct) keep neither
    order nor integers. Kubeflow caches no step: the workspace's keys decide what need not run again.
    """

    def wire(recipe: str, site: str, run: str) -> None:
        common = {"recipe": recipe, "site": site, "run": run}

        def step(component: Any, stage: str | None = None, **inputs: Any) -> Any:
            name = component.python_func.__name__
            task = component(**common, **({} if stage is None else {"stage": stage}), **inputs)
            task.set_caching_options(enable_caching=False)
            task.set_container_image(image)
            task.set_display_name(name if stage is None else f"{name}-{stage}")
            return task.outputs["manifest"]

        images = step(ingest_images)
        text_images = step(render_text, images=images)
        edits = step(build_edits, images=images)
        raw = {"images": images, "text_images": text_images, "edits": edits}
        kept: dict[str, Any] = {}
        for stage, before in zip(stages, [None, *stages], strict=False):
            kept[stage] = step(filter_images, stage, **raw, **({} if before is None else {"previous": kept[before]}))
        captions = step(caption_images, kept=kept[stages[0]], **raw)
        encoder = step(prepare_encoder, captions=captions, edits=edits)
        vae = step(train_vae, kept=kept[stages[0]], **raw)
        checkpoints: list[Any] = []
        for stage in stages:
            latents = step(encode_latents, stage, kept=kept[stage], captions=captions, vae=vae, encoder=encoder, **raw)
            previous = {"previous": checkpoints[-1]} if checkpoints else {}
            checkpoints.append(step(train_mmdit, stage, latents=latents, encoder=encoder, **previous))
        trained = checkpoints[-1]
        common_inputs = {"vae": vae, "encoder": encoder, "captions": captions, "images": images, "edits": edits}
        rewards: dict[str, Any] = {}
        if sections.grpo:
            earlier = {"earlier": checkpoints[-2]} if len(checkpoints) > 1 else {}
            preferences = step(build_preferences, model=trained, **common_inputs, **earlier)
            rewards = {dimension: step(train_reward, dimension, preferences=preferences) for dimension in DIMENSIONS}
            trained = step(align_grpo, model=trained, **common_inputs, **rewards)
        also: dict[str, Any] = {}
        if sections.dmd:
            base = {"base": checkpoints[-1]} if sections.grpo else {}
            also["student"] = step(distill_dmd, model=trained, **common_inputs, **base)
        if sections.enhancer:
            also["enhancer"] = step(train_enhancer, captions=captions, images=images, edits=edits)
        if sections.enhancer_grpo:
            generator = also.get("student", trained)
            also["enhancer"] = step(align_enhancer, enhancer=also["enhancer"], generator=generator, **common_inputs, **rewards)
        evaluation = step(evaluate_model, model=trained, **common_inputs)
        registration = step(register_model, model=trained, vae=vae, encoder=encoder, evaluation=evaluation, **also)
        step(publish_report, model=trained, vae=vae, evaluation=evaluation, registration=registration, **also)

    pipeline: GraphComponent = dsl.pipeline(name=NAME, description="From raw images to a model that draws and edits, and its report.")(wire)
    return pipeline
