"""The component of the step encode_latents; what it does is in model_core/steps/encode_latents.py."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def encode_latents(
    recipe: str,
    site: str,
    run: str,
    stage: str,
    kept: Input[Dataset],
    captions: Input[Dataset],
    vae: Input[Model],
    encoder: Input[Model],
    images: Input[Dataset],
    text_images: Input[Dataset],
    edits: Input[Dataset],
    manifest: Output[Dataset],
) -> None:
    """Encodes a stage's images to latents, in buckets of equal shape, with their captions beside them.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        stage: Stage of the curriculum, as named under mmdit.stages in the recipe.
        kept: Manifest of filter_images of the same stage: what passed its filters.
        captions: Manifest of caption_images: four captions for every kept image.
        vae: Manifest of train_vae: the autoencoder's weights.
        encoder: Manifest of prepare_encoder: the frozen condition encoder, which says how long each prompt is.
        images: Manifest of ingest_images: raw image shards.
        text_images: Manifest of render_text: shards of synthetic text images.
        edits: Manifest of build_edits: shards of edit pairs.
        manifest: Where the manifest of the result goes. Latent shards in buckets.
    """
    from components.launch import run_step

    run_step(
        "encode_latents",
        recipe=recipe,
        site=site,
        run=run,
        stage=stage,
        inputs={
            "kept": kept.path,
            "captions": captions.path,
            "vae": vae.path,
            "encoder": encoder.path,
            "images": images.path,
            "text_images": text_images.path,
            "edits": edits.path,
        },
        output=manifest.path,
    )
