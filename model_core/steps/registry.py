"""The steps of the DAG: what each reads, takes and leaves. Their code is in the module of the same name."""

from __future__ import annotations

from dataclasses import dataclass

from model_core.documents import UserError
from model_core.manifest import ManifestKind
from model_core.recipe_alignment import DIMENSIONS


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """One node of the DAG.

    `version` is raised when the step's result changes for the same inputs. `sections` are the dotted recipe paths that
    the step reads, `{stage}` standing for its stage: they and nothing else of the recipe enter its key. `optional`
    inputs may be absent. A `staged` step is repeated: for each stage of the curriculum, or for the `stages` named here.
    `sources` says that the step's key also depends on what the recipe's data sources hold now, `votes` on what its files of
    votes hold, `parallel` that several processes may do it together.
    """

    name: str
    version: int
    sections: tuple[str, ...]
    inputs: tuple[str, ...]
    kind: ManifestKind
    optional: tuple[str, ...] = ()
    staged: bool = False
    stages: tuple[str, ...] = ()
    sources: bool = False
    votes: bool = False
    parallel: bool = False


RAW = ("images", "text_images", "edits")
STAGE = "mmdit.stages.{stage}."

STEPS: dict[str, StepSpec] = {
    spec.name: spec
    for spec in (
        StepSpec(name="ingest_images", version=2, sections=("seed", "data"), inputs=(), kind="dataset", sources=True),
        StepSpec(name="render_text", version=2, sections=("seed", "text_images"), inputs=("images",), kind="dataset"),
        StepSpec(name="build_edits", version=2, sections=("seed", "edits", "data.scenes"), inputs=("images",), kind="dataset"),
        StepSpec(
            name="filter_images",
            version=1,
            sections=("seed", STAGE + "filter"),
            inputs=RAW,
            optional=("previous",),
            kind="dataset",
            staged=True,
        ),
        StepSpec(name="caption_images", version=1, sections=("seed", "captions"), inputs=("kept", *RAW), kind="dataset"),
        StepSpec(
            name="prepare_encoder",
            version=1,
            sections=("seed", "encoder", "captions.max_tokens"),
            inputs=("captions", "edits"),
            kind="model",
        ),
        StepSpec(name="train_vae", version=2, sections=("seed", "vae"), inputs=("kept", *RAW), kind="model", parallel=True),
        StepSpec(
            name="encode_latents",
            version=2,
            sections=(STAGE + "resolution_px", STAGE + "kinds", STAGE + "cache_states"),
            inputs=("kept", "captions", "vae", "encoder", *RAW),
            kind="dataset",
            staged=True,
        ),
        StepSpec(
            name="train_mmdit",
            version=2,
            sections=(
                "seed",
                "mmdit.path",
                "mmdit.model",
                "mmdit.logit_normal",
                "mmdit.uncond_dropout",
                "mmdit.weight_decay",
                "mmdit.betas",
                "mmdit.grad_clip",
                "mmdit.guard",
                "mmdit.precision",
                "mmdit.ema_decay",
                "mmdit.caption_weights",
                "mmdit.window_row_groups",
                "mmdit.micro_batch_tokens",
                "mmdit.shift_mu",
                "mmdit.log_every_steps",
                *(
                    STAGE + field
                    for field in ("kinds", "edit_share", "text_image_share", "cache_states", "steps", "batch_size", "lr", "warmup_steps")
                ),
            ),
            inputs=("latents", "encoder"),
            optional=("previous",),
            kind="model",
            staged=True,
            parallel=True,
        ),
        StepSpec(
            name="build_preferences",
            version=1,
            sections=("seed", "preferences", "sampling", "data.scenes", "mmdit.stages"),
            inputs=("images", "edits", "captions", "vae", "encoder", "model"),
            optional=("earlier",),
            kind="dataset",
            votes=True,
        ),
        StepSpec(
            name="train_reward",
            version=1,
            sections=("seed", "reward"),
            inputs=("preferences",),
            kind="model",
            staged=True,
            stages=DIMENSIONS,
        ),
        StepSpec(
            name="align_grpo",
            version=1,
            sections=("seed", "grpo", "sampling", "data.scenes", "edits.operations", "mmdit.stages"),
            inputs=("model", "vae", "encoder", "captions", "images", "edits"),
            optional=DIMENSIONS,
            kind="model",
            parallel=True,
        ),
        StepSpec(
            name="distill_dmd",
            version=1,
            sections=("seed", "dmd", "sampling", "data.scenes", "edits.operations", "mmdit.stages"),
            inputs=("model", "vae", "encoder", "captions", "images", "edits"),
            optional=("base",),
            kind="model",
            parallel=True,
        ),
        StepSpec(
            name="train_enhancer",
            version=1,
            sections=("seed", "enhancer", "data.scenes"),
            inputs=("captions", "images", "edits"),
            kind="model",
        ),
        StepSpec(
            name="align_enhancer",
            version=1,
            sections=(
                "seed",
                "enhancer_grpo",
                "enhancer.degradations",
                "enhancer.max_new_tokens",
                "sampling",
                "data.scenes",
                "edits.operations",
                "mmdit.stages",
            ),
            inputs=("enhancer", "generator", "vae", "encoder", "captions", "images", "edits"),
            optional=DIMENSIONS,
            kind="model",
        ),
        StepSpec(
            name="evaluate_model",
            version=1,
            sections=("seed", "evaluation", "sampling", "data.scenes", "mmdit.stages"),
            inputs=("model", "vae", "encoder", "captions", "images", "edits"),
            kind="evaluation",
        ),
        StepSpec(
            name="register_model",
            version=1,
            sections=("registry", "sampling", "mmdit.stages"),
            inputs=("model", "vae", "encoder", "evaluation"),
            optional=("student", "enhancer"),
            kind="model",
        ),
        StepSpec(
            name="publish_report",
            version=1,
            sections=(),
            inputs=("model", "vae", "evaluation", "registration"),
            optional=("student", "enhancer"),
            kind="report",
        ),
    )
}


def step_spec(name: str) -> StepSpec:
    """The spec of a step; raises UserError for a name that is none."""
    if name not in STEPS:
        raise UserError(f"step: found {name!r}; allowed are {', '.join(STEPS)}")
    return STEPS[name]
