"""The component of the step build_preferences; what it does is in model_core/steps/build_preferences.py."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def build_preferences(
    recipe: str,
    site: str,
    run: str,
    images: Input[Dataset],
    edits: Input[Dataset],
    captions: Input[Dataset],
    vae: Input[Model],
    encoder: Input[Model],
    model: Input[Model],
    manifest: Output[Dataset],
    earlier: Input[Model] = None,
) -> None:
    """Makes preference pairs for five reward models: of known order, drawn by models, and labelled by people's votes.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        images: Manifest of ingest_images: raw image shards.
        edits: Manifest of build_edits: shards of edit pairs.
        captions: Manifest of caption_images: four captions for every kept image.
        vae: Manifest of train_vae: the autoencoder's weights.
        encoder: Manifest of prepare_encoder: the frozen condition encoder.
        model: Manifest of train_mmdit: the model that draws pairs for people to compare.
        manifest: Where the manifest of the result goes. Preference pairs and a sheet of some of them.
        earlier: Manifest of another train_mmdit, whose pictures are compared with the model's; may be absent.
    """
    from components.launch import run_step

    run_step(
        "build_preferences",
        recipe=recipe,
        site=site,
        run=run,
        inputs={
            "images": images.path,
            "edits": edits.path,
            "captions": captions.path,
            "vae": vae.path,
            "encoder": encoder.path,
            "model": model.path,
            "earlier": earlier.path if earlier else None,
        },
        output=manifest.path,
    )
