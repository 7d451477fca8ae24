"""The component of the step caption_images; what it does is in model_core/steps/caption_images.py."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def caption_images(
    recipe: str,
    site: str,
    run: str,
    kept: Input[Dataset],
    images: Input[Dataset],
    text_images: Input[Dataset],
    edits: Input[Dataset],
    manifest: Output[Dataset],
) -> None:
    """Gives every kept image a general, a text, a knowledge and a structured caption.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        kept: Manifest of filter_images of the first stage: what passed its filters.
        images: Manifest of ingest_images: raw image shards.
        text_images: Manifest of render_text: shards of synthetic text images.
        edits: Manifest of build_edits: shards of edit pairs.
        manifest: Where the manifest of the result goes. Captions by sample.
    """
    from components.launch import run_step

    run_step(
        "caption_images",
        recipe=recipe,
        site=site,
        run=run,
        inputs={"kept": kept.path, "images": images.path, "text_images": text_images.path, "edits": edits.path},
        output=manifest.path,
    )
