"""The component of the step publish_report; what it does is in model_core/steps/publish_report.py."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Input, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def publish_report(
    recipe: str,
    site: str,
    run: str,
    model: Input[Model],
    vae: Input[Model],
    evaluation: Input[Artifact],
    registration: Input[Model],
    manifest: Output[Artifact],
    page: Output[HTML],
    student: Input[Model] = None,
    enhancer: Input[Model] = None,
) -> None:
    """Writes the run's report: steps with time and reuse, curves, samples, edits, reconstructions and scores.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        model: Manifest of train_mmdit of the last stage.
        vae: Manifest of train_vae: the autoencoder's weights.
        evaluation: Manifest of evaluate_model: scores and fixed-seed grids.
        registration: Manifest of register_model: the registered version.
        manifest: Where the manifest of the result goes. report.html and report.json.
        page: The report, as Kubeflow shows it.
        student: Manifest of distill_dmd: the few-step student; absent where the recipe distils none.
        enhancer: Manifest of align_enhancer, or of train_enhancer: the Prompt Enhancer; absent where the recipe trains none.
    """
    from components.launch import run_step

    run_step(
        "publish_report",
        recipe=recipe,
        site=site,
        run=run,
        inputs={
            "model": model.path,
            "vae": vae.path,
            "evaluation": evaluation.path,
            "registration": registration.path,
            "student": student.path if student else None,
            "enhancer": enhancer.path if enhancer else None,
        },
        output=manifest.path,
        page=page.path,
    )
