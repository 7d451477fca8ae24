"""The component of the step align_grpo; what it does is in model_core/steps/align_grpo.py."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def align_grpo(
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
    aesthetics: Input[Model] = None,
    alignment: Input[Model] = None,
    portrait: Input[Model] = None,
    instruction_following: Input[Model] = None,
    visual_consistency: Input[Model] = None,
) -> None:
    """Reinforcement learning of the last stage's model from rewards: guided rollouts, an objective without the unconditional branch.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        model: Manifest of train_mmdit of the last stage.
        vae: Manifest of train_vae.
        encoder: Manifest of prepare_encoder: the frozen condition encoder.
        captions: Manifest of caption_images: the prompts.
        images: Manifest of ingest_images.
        edits: Manifest of build_edits: the instructions and their sources.
        manifest: Where the manifest of the result goes: the aligned model, every update, pictures before and after.
        aesthetics: Manifest of train_reward, and so are the next four; absent where grpo weighs none of them.
        alignment: Whether the picture shows what the prompt says.
        portrait: Anatomy of people.
        instruction_following: Whether an edit was done as told.
        visual_consistency: Whether all else stayed as it was.
    """
    from components.launch import run_step

    run_step(
        "align_grpo",
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
            "aesthetics": aesthetics.path if aesthetics else None,
            "alignment": alignment.path if alignment else None,
            "portrait": portrait.path if portrait else None,
            "instruction_following": instruction_following.path if instruction_following else None,
            "visual_consistency": visual_consistency.path if visual_consistency else None,
        },
        output=manifest.path,
    )
