"""Recipes and sites by name or path: built-in ones lie in `pipelines/recipes` and `pipelines/sites`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model_core.documents import UserError
from model_core.recipe import Recipe, load_recipe
from model_core.site import Site, load_site

HERE = Path(__file__).parent
DEFAULT_SITE = "local"


def document_path(name: str, kind: str) -> Path:
    """The file of a built-in `kind` ("recipe" or "site"), or the path itself; raises UserError when there is neither."""
    folder = HERE / f"{kind}s"
    built_in = folder / f"{name}.yaml"
    if "/" not in name and built_in.is_file():
        return built_in
    if not Path(name).is_file():
        names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise UserError(f"{kind} {name!r}: there is no such file; built-in ones are {names}")
    return Path(name)


def find_recipe(name: str, assignments: Sequence[str] = ()) -> Recipe:
    """The recipe of a built-in name or a path, with `--set` assignments; raises UserError for any mistake."""
    return load_recipe(document_path(name, "recipe"), list(assignments))


def find_site(name: str) -> Site:
    """The site of a built-in name or a path; raises UserError for any mistake.

    Its folders are absolute afterwards: what runs elsewhere, or in another working folder, finds the same place.
    """
    site = load_site(document_path(name, "site"))
    return site.model_copy(update={"workspace": site.workspace_uri, "scratch": str(site.scratch_folder)})
