"""The component of the step build_edits; what it does is in model_core/steps/build_edits.py."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def build_edits(
    recipe: str,
    site: str,
    run: str,
    images: Input[Dataset],
    manifest: Output[Dataset],
) -> None:
    """Makes edit pairs from images: source, instruction and target.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        images: Manifest of ingest_images: raw image shards.
        manifest: Where the manifest of the result goes. Shards of edit pairs.
    """
    from components.launch import run_step

    run_step(
        "build_edits",
        recipe=recipe,
        site=site,
        run=run,
        inputs={"images": images.path},
        output=manifest.path,
    )
