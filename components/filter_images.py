"""The component of the step filter_images; what it does is in model_core/steps/filter_images.py."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def filter_images(
    recipe: str,
    site: str,
    run: str,
    stage: str,
    images: Input[Dataset],
    text_images: Input[Dataset],
    edits: Input[Dataset],
    manifest: Output[Dataset],
    previous: Input[Dataset] = None,
) -> None:
    """Decides which rows a stage of the curriculum keeps, and counts what each filter takes away.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        stage: Stage of the curriculum, as named under mmdit.stages in the recipe.
        images: Manifest of ingest_images: raw image shards.
        text_images: Manifest of render_text: shards of synthetic text images.
        edits: Manifest of build_edits: shards of edit pairs.
        manifest: Where the manifest of the result goes. Index of the kept rows, and the funnel.
        previous: Manifest of filter_images of the stage before; absent for the first stage.
    """
    from components.launch import run_step

    run_step(
        "filter_images",
        recipe=recipe,
        site=site,
        run=run,
        stage=stage,
        inputs={
            "images": images.path,
            "text_images": text_images.path,
            "edits": edits.path,
            "previous": previous.path if previous else None,
        },
        output=manifest.path,
    )
