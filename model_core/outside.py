"""What a step reads that is no input: the recipe's data sources, and people's votes. What they hold now is part of the step's key."""

from __future__ import annotations

from typing import Any

from model_core.recipe import Recipe
from model_core.site import Site
from model_core.steps.registry import StepSpec


def outside_fingerprint(spec: StepSpec, recipe: Recipe, site: Site) -> list[Any] | None:
    """What lies outside of the workspace and is read by the step, as a JSON value; None for a step that reads nothing there.

    Raises UserError where it is missing.
    """
    if spec.sources:
        from model_core.data.sources import source_fingerprint

        return source_fingerprint(recipe, site)
    if spec.votes and recipe.preferences.votes:
        from model_core.data.votes import votes_fingerprint

        return votes_fingerprint(recipe, site)
    return None
