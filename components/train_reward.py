"""The component of the step train_reward; what it does is in model_core/steps/train_reward.py."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
def train_reward(
    recipe: str,
    site: str,
    run: str,
    stage: str,
    preferences: Input[Dataset],
    manifest: Output[Model],
) -> None:
    """Trains the reward model of one dimension, calibrates it, and reports how well it orders pairs that it never saw.

    Args:
        recipe: What to train: the whole recipe as JSON text (model_core/recipe.py).
        site: Where to run: the whole site as JSON text (model_core/site.py).
        run: Name of the run that this step belongs to.
        stage: The dimension: aesthetics, alignment, portrait, instruction_following or visual_consistency.
        preferences: Manifest of build_preferences: pairs of pictures, by dimension, and which one is better.
        manifest: Where the manifest of the result goes. Weights, tokenizer, calibration and report card of the reward model.
    """
    from components.launch import run_step

    run_step(
        "train_reward",
        recipe=recipe,
        site=site,
        run=run,
        stage=stage,
        inputs={"preferences": preferences.path},
        output=manifest.path,
    )
