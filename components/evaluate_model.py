"""The component of the step evaluate_model; what it does is in model_core/steps/evaluate_model.py."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def evaluate_model(
    recipe: str,
    site: str,
    run: str,
    model: Input[Model],
    vae: Input[Model],
    encoder: Input[Model],
    captions: Input[Dataset],
    images: Input[Dataset],
    edits: Input[Dataset],
    manifest: Output[Artifact],
    scores: Output[Metrics],
) -> None:
    """Draws fixed-seed samples and edits, and scores them with a judge that training never sees.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        model: Manifest of train_mmdit of the last stage.
        vae: Manifest of train_vae: the autoencoder's weights.
        encoder: Manifest of prepare_encoder: the frozen condition encoder.
        captions: Manifest of caption_images: four captions for every kept image.
        images: Manifest of ingest_images: raw image shards.
        edits: Manifest of build_edits: shards of edit pairs.
        manifest: Where the manifest of the result goes. Scores, samples and edits.
        scores: The scores, as Kubeflow shows them.
    """
    from components.launch import run_step

    run_step(
        "evaluate_model",
        recipe=recipe,
        site=site,
        run=run,
        inputs={
            "model": model.path,
            "vae": vae.path,
            "encoder": encoder.path,
            "captions": captions.path,
            "images": images.path,
            "edits": edits.path,
        },
        output=manifest.path,
        metrics=scores,
    )
