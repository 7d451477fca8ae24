"""The component of the step align_enhancer; what it does is in model_core/steps/align_enhancer.py."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def align_enhancer(
    recipe: str,
    site: str,
    run: str,
    enhancer: Input[Model],
    generator: Input[Model],
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
    """Reinforcement learning of the Prompt Enhancer: its prompts are drawn by a frozen generator, and the pictures rewarded.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        enhancer: Manifest of train_enhancer: where the policy begins.
        generator: Manifest of distill_dmd, align_grpo or train_mmdit: the model that draws; it is not trained.
        vae: Manifest of train_vae.
        encoder: Manifest of prepare_encoder: the frozen condition encoder.
        captions: Manifest of caption_images: what short requests are made of.
        images: Manifest of ingest_images.
        edits: Manifest of build_edits: the instructions and their sources.
        manifest: Where the manifest of the result goes: the aligned enhancer, every update, pictures drawn in three ways.
        aesthetics: Manifest of train_reward, and so are the next four; absent where enhancer_grpo weighs none of them.
        alignment: Whether the picture shows what the user means.
        portrait: Anatomy of people.
        instruction_following: Whether an edit was done as told.
        visual_consistency: Whether all else stayed as it was.
    """
    from components.launch import run_step

    run_step(
        "align_enhancer",
        recipe=recipe,
        site=site,
        run=run,
        inputs={
            "enhancer": enhancer.path,
            "generator": generator.path,
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
