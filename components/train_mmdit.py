"""The component of the step train_mmdit; what it does is in model_core/steps/train_mmdit.py."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def train_mmdit(
    recipe: str,
    site: str,
    run: str,
    stage: str,
    latents: Input[Dataset],
    encoder: Input[Model],
    manifest: Output[Model],
    previous: Input[Model] = None,
) -> None:
    """Trains the single-stream transformer for one stage of the curriculum, on text-to-image and editing in one stream.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        stage: Stage of the curriculum, as named under mmdit.stages in the recipe.
        latents: Manifest of encode_latents of the same stage: latent shards in buckets.
        encoder: Manifest of prepare_encoder: the frozen condition encoder.
        manifest: Where the manifest of the result goes. Weights of the stage's end, and their moving average.
        previous: Manifest of train_mmdit of the stage before; absent for the first stage.
    """
    from components.launch import run_step

    run_step(
        "train_mmdit",
        recipe=recipe,
        site=site,
        run=run,
        stage=stage,
        inputs={"latents": latents.path, "encoder": encoder.path, "previous": previous.path if previous else None},
        output=manifest.path,
    )
