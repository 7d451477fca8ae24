"""Holds a finished training's ledger against the data set it was trained on, long after the training."""

from __future__ import annotations

import sys
from fractions import Fraction
from typing import Any

from model_core.data.index import Index, read_index
from model_core.data.latents import latent_group, latent_rows
from model_core.data.plan import Plan
from model_core.data.row_groups import RowGroups
from model_core.documents import UserError
from model_core.manifest import Manifest
from model_core.site import Site
from model_core.storage import StorageError
from model_core.training.ledger import FILE_NAME as LEDGER
from model_core.training.ledger import FORMAT, Ledger, check_ledger
from model_core.workspace import Address, InputFolder, Workspace


def audit(manifest: Manifest, site: Site) -> list[str]:
    """What is wrong with the ledger of a step's result, a sentence each.

    Raises UserError when the ledger, or the latents that it must be held against, cannot be had.
    """
    document = InputFolder(manifest, site=site).read_json(LEDGER)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise UserError(f"{manifest.uri}/{LEDGER}: found ledger format {found!r}; allowed is {FORMAT!r}")
    parent = next(parent for parent in manifest.parents if parent.name == "latents")
    root = manifest.uri.removesuffix(f"/{manifest.step}/{manifest.key}")
    latents = Workspace(site.model_copy(update={"workspace": root})).find(Address(parent.step, manifest.stage, parent.key))
    if latents is None:
        raise UserError(f"{root}/{parent.step}/{parent.key}: found no result; the ledger is held against it")
    folder = InputFolder(latents, site=site)
    index = read_index(folder)
    if index.digest != document["plan"]["index"]:
        return [f"is about a data set with index {document['plan']['index'][:12]}; found is {index.digest[:12]}"]
    ledger = Ledger()
    ledger.load_state_dict(document)
    plan = plan_from(document["plan"], index)
    groups = RowGroups(folder, index, latent_group, capacity=4, say=lambda line: print(line, file=sys.stderr))
    try:
        return check_ledger(ledger, plan, groups)
    except StorageError as error:
        raise UserError(str(error)) from error


def plan_from(document: dict[str, Any], index: Index) -> Plan:
    """The plan that `plan_document` told of."""
    shares = {kind: Fraction(*share) for kind, share in document["shares"].items()}
    rows = latent_rows(index, kinds=list(shares))
    return Plan(document["index"], document["seed"], document["stage"], rows, shares, document["batch_size"], document["window"])
