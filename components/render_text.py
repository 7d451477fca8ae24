"""The component of the step render_text; what it does is in model_core/steps/render_text.py."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def render_text(
    recipe: str,
    site: str,
    run: str,
    images: Input[Dataset],
    manifest: Output[Dataset],
) -> None:
    """Draws synthetic text images: pure paragraphs, text in a scene, filled templates.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        images: Manifest of ingest_images: raw image shards.
        manifest: Where the manifest of the result goes. Shards of text images.
    """
    from components.launch import run_step

    run_step(
        "render_text",
        recipe=recipe,
        site=site,
        run=run,
        inputs={"images": images.path},
        output=manifest.path,
    )
