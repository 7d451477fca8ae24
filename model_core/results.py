"""A step's result as users name it: by a run, or by path or uri of its manifest or its folder."""

from __future__ import annotations

from pathlib import Path

from model_core.documents import UserError
from model_core.manifest import FILE_NAME, Manifest, parse_manifest
from model_core.run_record import read_run, read_steps
from model_core.storage import NotFoundError, open_storage
from model_core.workspace import Address, Workspace


def find_result(workspace: Workspace, name: str, *, step: str, what: str, missing: str) -> Manifest:
    """The result of `step`, which has no stages, that `name` means: a run's, or what lies at a path or uri.

    `what` opens the sentences about it ("model"), `missing` says that a run has none yet. Raises UserError when there is none, or
    that of another step.
    """
    if "/" not in name:
        read_run(workspace.storage, name)
        records = [record for record in read_steps(workspace.storage, name) if record.step == step]
        found = workspace.find(Address(step, None, records[0].key)) if records else None
        if found is None:
            raise UserError(f"{what} {name}: {missing}")
        return found
    uri = name.removesuffix("/").removesuffix("/" + FILE_NAME)
    if "://" not in uri:
        uri = Path(uri).expanduser().resolve().as_uri()
    try:
        found = parse_manifest(open_storage(uri, workspace.site.s3).get(FILE_NAME), f"{uri}/{FILE_NAME}")
    except NotFoundError as error:
        allowed = f"allowed are a run's name and the folder of a result of {step}"
        raise UserError(f"{what} {name}: there is no {FILE_NAME} at {uri}; {allowed}") from error
    if found.step != step:
        raise UserError(f"{what} {name}: found the result of {found.step}; allowed is that of {step}")
    return found
