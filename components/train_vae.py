"""The component of the step train_vae; what it does is in model_core/steps/train_vae.py."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def train_vae(
    recipe: str,
    site: str,
    run: str,
    kept: Input[Dataset],
    images: Input[Dataset],
    text_images: Input[Dataset],
    edits: Input[Dataset],
    manifest: Output[Model],
) -> None:
    """Trains the f16c64 residual autoencoder, and scores its reconstructions on held-out images.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        kept: Manifest of filter_images of the first stage: what passed its filters.
        images: Manifest of ingest_images: raw image shards.
        text_images: Manifest of render_text: shards of synthetic text images.
        edits: Manifest of build_edits: shards of edit pairs.
        manifest: Where the manifest of the result goes. Weights, configuration and latent statistics of the autoencoder.
    """
    from components.launch import run_step

    run_step(
        "train_vae",
        recipe=recipe,
        site=site,
        run=run,
        inputs={"kept": kept.path, "images": images.path, "text_images": text_images.path, "edits": edits.path},
        output=manifest.path,
    )
