"""The component of the step ingest_images; what it does is in model_core/steps/ingest_images.py."""

from kfp import dsl
from kfp.dsl import Dataset, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def ingest_images(
    recipe: str,
    site: str,
    run: str,
    manifest: Output[Dataset],
) -> None:
    """Reads the recipe's sources into raw shards: images with captions, sizes, perceptual hashes, provenance and licences.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        manifest: Where the manifest of the result goes. Raw image shards.
    """
    from components.launch import run_step

    run_step(
        "ingest_images",
        recipe=recipe,
        site=site,
        run=run,
        inputs={},
        output=manifest.path,
    )
