"""The component of the step train_enhancer; what it does is in model_core/steps/train_enhancer.py."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def train_enhancer(
    recipe: str,
    site: str,
    run: str,
    captions: Input[Dataset],
    images: Input[Dataset],
    edits: Input[Dataset],
    manifest: Output[Model],
) -> None:
    """Trains the Prompt Enhancer on short requests made of fine captions, and reports how it answers requests that it never saw.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        captions: Manifest of caption_images: the fine captions.
        images: Manifest of ingest_images: the pictures that the captions are of.
        edits: Manifest of build_edits: the instructions.
        manifest: Where the manifest of the result goes. Weights, tokenizer, card and curves of the Prompt Enhancer.
    """
    from components.launch import run_step

    run_step(
        "train_enhancer",
        recipe=recipe,
        site=site,
        run=run,
        inputs={"captions": captions.path, "images": images.path, "edits": edits.path},
        output=manifest.path,
    )
