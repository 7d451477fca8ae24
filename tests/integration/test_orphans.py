"""Steps that are killed again and again leave nothing behind but what `darkroom gc` lists and removes, and end with the same result."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from model_core.manifest import Manifest, parse_manifest
from model_core.site import Site, load_site
from model_core.storage import Storage
from model_core.workspace import Workspace

# What is waited for before each kill of a step: its claim, or a checkpoint that it can go on from. Training, which takes seconds to
# import torch, is killed on S3 alone; tests/integration/test_recovery.py kills it on a disk.
KILLS_ON_DISK = {"ingest_images": ["claim.json"] * 10}
KILLS_ON_S3 = {"ingest_images": ["claim.json"] * 9, "train_vae": ["COMMIT.json"]}
LONGEST_DELAY_SECONDS = 0.6
RECIPE = {
    "name": "orphans",
    "data": {"sources": ["synthetic://scenes"], "scenes": {"num_images": 64, "size_px": 64}},
    "text_images": {"num_images": 4, "size_px": 64},
    "edits": {"num_pairs": 4},
    "vae": {
        "model": {
            "stem_fold": 4,
            "encoder_widths": [16, 16, 32],
            "decoder_widths": [32, 16, 16],
            "encoder_blocks": 1,
            "decoder_blocks": 1,
            "mid_attention": False,
        },
        "crop_px": 64,
        "steps": 16,
        "batch_size": 2,
        "warmup_steps": 2,
        "checkpoint_every_steps": 2,
    },
    "mmdit": {
        "model": {"num_layers": 1, "num_heads": 1, "head_dim": 12, "rope_axes": [4, 4, 4]},
        "stages": {"S1": {"resolution_px": 64, "kinds": ["image"], "steps": 1, "batch_size": 1}},
    },
}
RAW = {"images": "ingest_images", "text_images": "render_text", "edits": "build_edits"}


@dataclass
class Place:
    """A workspace, and steps that are done there by `python -m model_core`."""

    folder: Path
    site_file: Path

    @property
    def site(self) -> Site:
        return load_site(self.site_file)

    def command(self, step: str, seed: int, inputs: dict[str, Path]) -> list[str]:
        recipe = self.folder / f"recipe-{seed}.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE | {"seed": seed}))
        stage = ["--stage", "S1"] if step == "filter_images" else []
        given = [f"--input={name}={path}" for name, path in inputs.items()]
        output = self.output(step, seed)
        fixed = ["--recipe", str(recipe), "--site", str(self.site_file), "--run", "r", "--output", str(output)]
        return [sys.executable, "-m", "model_core", step, *fixed, *stage, *given]

    def output(self, step: str, seed: int) -> Path:
        return self.folder / f"{step}-{seed}.json"

    def start(self, step: str, seed: int, inputs: dict[str, Path]) -> subprocess.Popen[str]:
        command = self.command(step, seed, inputs)
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(self.folder))

    def run(self, step: str, seed: int, inputs: dict[str, Path]) -> Manifest:
        running = self.start(step, seed, inputs)
        output, _ = running.communicate(timeout=120)
        assert running.returncode == 0, output
        return parse_manifest(self.output(step, seed).read_bytes(), step)

    def gc(self, *arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "pipelines.cli", "gc", "--site", str(self.site_file), "--grace-minutes", "0", "--json", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(self.folder), timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def leftovers(self) -> set[str]:
        """Uris of all that is neither named by a manifest nor history: objects, unfinished writes, files and empty folders."""
        workspace = Workspace(self.site)
        storage, local = workspace.storage, workspace.storage.local_path("x")
        found = {f"{storage.uri}/{entry.path}" for entry in storage.list()}
        found |= {f"{storage.uri}/{write.path}" for write in storage.unfinished()}
        roots = [self.site.scratch_folder] if local is None else [self.site.scratch_folder, local.parent]
        for root in roots:
            found |= {path.as_uri() for path in root.rglob("*") if path.is_file() or not any(path.iterdir())}
        history = (f"{storage.uri}/runs/", f"{storage.uri}/.staging", (self.site.scratch_folder / "spool").as_uri())
        # The shared folders above scratch stay when the last key below them goes.
        shared = {path.as_uri() for path in [*self.site.scratch_folder.glob("*"), *self.site.scratch_folder.glob("*/*")]}
        named = {f"{manifest.uri}/{entry.path}" for _, manifest in workspace.manifests() for entry in manifest.files}
        named |= {f"{storage.uri}/{path}" for path, _ in workspace.manifests()}
        return {uri for uri in found - named - shared if not uri.startswith(history)}


def environment(folder: Path) -> dict[str, str]:
    (folder / "tmp").mkdir(exist_ok=True)
    return os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")}


def listed(told: dict[str, Any], *kinds: str) -> list[str]:
    return [entry["uri"] for kind in kinds for entry in told[kind]]


def unlisted(leftovers: set[str], uris: list[str]) -> set[str]:
    return {uri for uri in leftovers if not any(uri == place or uri.startswith(f"{place}/") for place in uris)}


@dataclass
class Undisturbed:
    """The same steps in a workspace of their own, never killed."""

    place: Place
    inputs: dict[str, dict[str, Path]]  # of each step

    def manifest(self, step: str, seed: int) -> Manifest:
        return self.place.run(step, seed, self.inputs[step])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "site.yaml").write_text(yaml.safe_dump({"workspace": str(folder / "workspace")}))
    place = Place(folder, folder / "site.yaml")
    raw: dict[str, Path] = {}
    for name, step in RAW.items():
        place.run(step, 0, {"images": raw["images"]} if raw else {})
        raw[name] = place.output(step, 0)
    place.run("filter_images", 0, raw)
    return Undisturbed(place, {"ingest_images": {}, "train_vae": {"kept": place.output("filter_images", 0), **raw}})


@pytest.fixture
def file_place(tmp_path: Path) -> Place:
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"workspace": str(tmp_path / "workspace")}))
    return Place(tmp_path, tmp_path / "site.yaml")


@pytest.fixture
def s3_place(lab_site: Path, tmp_path: Path) -> Place:
    return Place(tmp_path, lab_site)


def written(storage: Storage, step: str, name: str) -> set[tuple[str, str]]:
    """Paths and etags of a step's objects of this name."""
    return {(entry.path, entry.etag) for entry in storage.list(f"{step}/") if entry.path.endswith(f"/{name}")}


def kill_again_and_again(place: Place, step: str, undisturbed: Undisturbed, *, kills: list[str]) -> int:
    """SIGKILL at keyed moments of a step's work; returns the seed whose step was killed last and is not done.

    One that ends before its moment is done with; the next seed's takes its place.
    """
    moments = random.Random(f"{step} {place.site.workspace.partition(':')[0]}")
    storage = Workspace(place.site).storage
    seed = 0
    for awaited in kills:
        while True:
            before = written(storage, step, awaited)
            running = place.start(step, seed, undisturbed.inputs[step])
            while running.poll() is None and written(storage, step, awaited) <= before:
                time.sleep(0.02)
            try:
                output, _ = running.communicate(timeout=moments.uniform(0.0, LONGEST_DELAY_SECONDS))
            except subprocess.TimeoutExpired:
                running.kill()
                running.communicate()
                break
            assert running.returncode == 0, output
            seed += 1
    return seed


def check(place: Place, undisturbed: Undisturbed, *, kills: dict[str, list[str]]) -> None:
    seeds = {step: kill_again_and_again(place, step, undisturbed, kills=awaited) for step, awaited in kills.items()}
    left = place.leftovers()
    assert left, "kills at these moments left nothing: choose others"

    shown = place.gc("--dry-run")
    assert unlisted(left, listed(shown, "orphans", "resumable")) == set()
    assert place.leftovers() == left

    removed = place.gc()
    assert listed(removed, "orphans") == listed(shown, "orphans")
    assert unlisted(place.leftovers(), listed(removed, "resumable")) == set()

    for step, seed in seeds.items():
        again = place.run(step, seed, undisturbed.inputs[step])
        assert again.content_digest == undisturbed.manifest(step, seed).content_digest
    place.gc()
    assert place.leftovers() == set()


def test_ten_kills_on_a_disk_leave_nothing_that_gc_does_not_find(file_place: Place, undisturbed: Undisturbed) -> None:
    check(file_place, undisturbed, kills=KILLS_ON_DISK)


@pytest.mark.lab
def test_ten_kills_on_s3_leave_nothing_that_gc_does_not_find(s3_place: Place, undisturbed: Undisturbed) -> None:
    check(s3_place, undisturbed, kills=KILLS_ON_S3)
