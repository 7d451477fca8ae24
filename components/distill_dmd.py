"""The component of the step distill_dmd; what it does is in model_core/steps/distill_dmd.py."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def distill_dmd(
    recipe: str,
    site: str,
    run: str,
    model: Input[Model],
    vae: Input[Model],
    encoder: Input[Model],
    captions: Input[Dataset],
    images: Input[Dataset],
    edits: Input[Dataset],
    manifest: Output[Model],
    base: Input[Model] = None,
) -> None:
    """Distils the model into a student of few steps: distribution matching with a fake score, guidance folded in.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        model: Manifest of align_grpo, or of train_mmdit of the last stage: the teacher.
        vae: Manifest of train_vae.
        encoder: Manifest of prepare_encoder: the frozen condition encoder.
        captions: Manifest of caption_images: the prompts.
        images: Manifest of ingest_images.
        edits: Manifest of build_edits: the instructions and their sources.
        manifest: Where the manifest of the result goes: the student, its sampler, curves, pictures beside the teacher's.
        base: Manifest of train_mmdit of the last stage, where the model was aligned: the teacher of the first steps.
    """
    from components.launch import run_step

    run_step(
        "distill_dmd",
        recipe=recipe,
        site=site,
        run=run,
        inputs={
            "model": model.path,
            "vae": vae.path,
            "encoder": encoder.path,
            "captions": captions.path,
            "images": images.path,
            "edits": edits.path,
            "base": base.path if base else None,
        },
        output=manifest.path,
    )
