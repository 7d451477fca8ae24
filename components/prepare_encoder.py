"""The component of the step prepare_encoder; what it does is in model_core/steps/prepare_encoder.py."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def prepare_encoder(
    recipe: str,
    site: str,
    run: str,
    captions: Input[Dataset],
    edits: Input[Dataset],
    manifest: Output[Model],
) -> None:
    """Provides the frozen vision-language model that reads prompts: from the recipe's path, or a tiny one made for the captions.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        captions: Manifest of caption_images: four captions for every kept image.
        edits: Manifest of build_edits: shards of edit pairs.
        manifest: Where the manifest of the result goes. Weights and tokenizer of the frozen condition encoder.
    """
    from components.launch import run_step

    run_step(
        "prepare_encoder",
        recipe=recipe,
        site=site,
        run=run,
        inputs={"captions": captions.path, "edits": edits.path},
        output=manifest.path,
    )
