"""The component of the step register_model; what it does is in model_core/steps/register_model.py."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def register_model(
    recipe: str,
    site: str,
    run: str,
    model: Input[Model],
    vae: Input[Model],
    encoder: Input[Model],
    evaluation: Input[Artifact],
    manifest: Output[Model],
    student: Input[Model] = None,
    enhancer: Input[Model] = None,
) -> None:
    """Registers the trained model with its parts and scores under the recipe's name and alias.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        model: Manifest of train_mmdit of the last stage.
        vae: Manifest of train_vae: the autoencoder's weights.
        encoder: Manifest of prepare_encoder: the frozen condition encoder.
        evaluation: Manifest of evaluate_model: scores and fixed-seed grids.
        manifest: Where the manifest of the result goes. The registered version: name, alias and the parts it names.
        student: Manifest of distill_dmd: the few-step student; absent where the recipe distils none.
        enhancer: Manifest of align_enhancer, or of train_enhancer: the Prompt Enhancer; absent where the recipe trains none.
    """
    from components.launch import run_step

    run_step(
        "register_model",
        recipe=recipe,
        site=site,
        run=run,
        inputs={
            "model": model.path,
            "vae": vae.path,
            "encoder": encoder.path,
            "evaluation": evaluation.path,
            "student": student.path if student else None,
            "enhancer": enhancer.path if enhancer else None,
        },
        output=manifest.path,
    )
