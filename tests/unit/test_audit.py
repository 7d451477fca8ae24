"""Ledgers of finished trainings against their data sets: the honest one passes, and what was altered later is found."""

import json
from pathlib import Path

import pytest

from model_core.data.folders import LocalFolder
from model_core.data.index import read_index, write_index
from model_core.data.latents import latent_group, latent_rows
from model_core.data.loader import Draws, Loader
from model_core.data.plan import make_plan
from model_core.data.row_groups import RowGroups
from model_core.documents import UserError
from model_core.manifest import Code, Manifest
from model_core.site import Site
from model_core.steps.registry import STEPS
from model_core.training.audit import audit
from model_core.training.distributed import Ranks
from model_core.training.ledger import FILE_NAME, Ledger, ledger_document
from model_core.workspace import Address, StepResult, Workspace
from pipelines.documents import find_recipe
from tests.latent_sets import MODEL, write_latents


def commit(site: Site, address: Address, inputs: dict[str, Manifest], write) -> Manifest:
    result = StepResult(stats={}, code=Code(version="0", git_sha=None, image_digest=None))
    workspace = Workspace(site)
    with workspace.attempt(address, "0") as folder:
        write(folder)
        return workspace.commit(
            address, folder, spec=STEPS[address.step], recipe=find_recipe("smoke"), inputs=inputs, result=result, confirm=lambda: None
        )


def trained_ledger(root: Path, *, lose: bool) -> dict:
    """The ledger of 7 steps over the latents below `root`, one sample of which may be lost."""
    folder = LocalFolder(root)
    index = read_index(folder)
    rows, shares = latent_rows(index, kinds=("image", "edit")), {"image": 0.5, "edit": 0.5}
    plan = make_plan(digest=index.digest, seed=0, stage="S1", rows=rows, shares=shares, batch_size=4, window=2)
    groups = RowGroups(folder, index, latent_group, capacity=16, say=print)
    ledger = Ledger()
    for number, batch in enumerate(Loader(groups, plan, Draws((0.0, 1.0), 0.1, {"general": 1.0}), MODEL).stream(0, 7)):
        ids = {key: members[1:] if lose and number == 5 else members for key, members in batch.ids.items()}
        ledger.add(ids)
    ledger.join(Ranks())
    return ledger_document(ledger, plan)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(workspace=str(tmp_path / "workspace"))


def train(site: Site, *, lose: bool = False, change=lambda document: document) -> Manifest:
    address = Address("encode_latents", "S1", "0" * 16)
    latents = commit(site, address, {}, lambda folder: write_latents(folder, {"image": 10, "edit": 6}))
    place = Path(latents.uri.removeprefix("file://"))

    def write(folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(change(trained_ledger(place, lose=lose))))

    return commit(site, Address("train_mmdit", "S1", "1" * 16), {"latents": latents}, write)


def test_an_honest_ledger_passes(site):
    assert audit(train(site), site) == []


def test_a_lost_sample_is_found_with_its_kind_and_epoch(site):
    problems = audit(train(site, lose=True), site)
    assert problems
    assert all("expected are" in problem for problem in problems)


def test_a_ledger_of_another_data_set_is_found(site):
    def change(document):
        return {**document, "plan": {**document["plan"], "index": "f" * 64}}

    assert "is about a data set with index ffffffffffff" in audit(train(site, change=change), site)[0]


@pytest.mark.parametrize("change", [lambda document: [], lambda document: {**document, "format": "darkroom-ledger-0"}])
def test_a_ledger_of_another_format_is_refused(site, change):
    with pytest.raises(UserError, match=r"ledger\.json: found ledger format .*; allowed is 'darkroom-ledger-1'"):
        audit(train(site, change=change), site)


def test_a_data_set_that_is_gone_or_altered_is_named(site, tmp_path):
    manifest = train(site)
    latents = tmp_path / "workspace/encode_latents" / ("0" * 16)
    write_index(latents, [])
    with pytest.raises(UserError, match="changed since it was written"):
        audit(manifest, site)
    (latents / "manifest.json").unlink()
    with pytest.raises(UserError, match="found no result"):
        audit(manifest, site)
