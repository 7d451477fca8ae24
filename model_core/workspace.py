"""Where a step's result lies: `<root>/<step>/<key>/`. Keys, claims, commits and reuse.

A step is a pure function of the recipe sections it reads and of its inputs, so its key names its result: same key, same
place. Every attempt has a folder of its own; `publication` makes it the result, for the holder of the key's claim alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from model_core.documents import UserError, canonical_digest
from model_core.manifest import FILE_NAME, Code, FileEntry, Manifest, Parent, TrackedRun, file_entry, parse_manifest
from model_core.publication import ATTEMPT_PREFIX, alone, clear_unnamed, is_private, publish, remove_empty, remove_tree
from model_core.recipe import Recipe, section
from model_core.scratch import use_cache
from model_core.site import Site
from model_core.steps.registry import StepSpec
from model_core.storage import NotFoundError, Storage, open_storage

KEY_LENGTH = 16


class InputFolder:
    """The files of one input: fetched when first asked for, and checked against their sha256."""

    def __init__(self, manifest: Manifest, *, site: Site) -> None:
        self.manifest = manifest
        self._storage = open_storage(manifest.uri, site.s3)
        self._cache = site.scratch_folder / "inputs" / manifest.step / manifest.key
        self._entries = {entry.path: entry for entry in manifest.files}
        self._checked: set[str] = set()
        self._in_use: int | None = None  # the cache's folder, open and locked for as long as this process lives

    def names(self, prefix: str = "") -> list[str]:
        """Paths of the files below `prefix`, in order."""
        return sorted(name for name in self._entries if name.startswith(prefix))

    def path(self, name: str) -> Path:
        """A local file with the content that the manifest promises.

        Raises UserError when the manifest names no such file, or the stored one is missing or has another content.
        """
        if name not in self._entries:
            raise UserError(f"{self.manifest.uri}: no file {name!r} in its manifest; it holds {', '.join(self.names()) or 'none'}")
        local = self._storage.local_path(name) or self._cache / name
        if name not in self._checked:
            if self._in_use is None and self._storage.local_path(name) is None:
                self._in_use = use_cache(self._cache)
            if not (local.exists() and matches(local, self._entries[name])):
                self._fetch(name, local)
            self._checked.add(name)
        return local

    def local(self, name: str) -> Path | None:
        """Where a file lies on this machine's disk, unchecked; None in a remote workspace."""
        return self._storage.local_path(name)

    def read(self, name: str, *, start: int, length: int) -> bytes:
        """A range of a file, unchecked: for readers that hold the digest of the range."""
        return self._storage.get(name, start=start, length=length)

    def folder(self, prefix: str) -> Path:
        """A local folder with every file below `prefix`."""
        depth = prefix.rstrip("/").count("/") + 1
        paths = [(name, self.path(name)) for name in self.names(prefix.rstrip("/") + "/")]
        if not paths:
            raise UserError(f"{self.manifest.uri}: no folder {prefix!r} in its manifest")
        name, path = paths[0]
        return path.parents[name.count("/") - depth]

    def read_json(self, name: str) -> Any:
        """The content of a JSON file."""
        return json.loads(self.path(name).read_bytes())

    def _fetch(self, name: str, local: Path) -> None:
        where = f"{self.manifest.uri}/{name}"
        if self._storage.local_path(name) is not None:
            raise UserError(
                f"{where}: {'changed since it was written' if local.exists() else 'missing'}; its manifest promises other content"
            )
        try:
            self._storage.download(name, local)
        except NotFoundError as error:
            raise UserError(f"{where}: missing; its manifest promises it") from error
        if not matches(local, self._entries[name]):
            local.unlink()
            raise UserError(f"{where}: changed since it was written; its manifest promises other content")


def matches(path: Path, entry: FileEntry) -> bool:
    """Whether a local file has the size and sha256 of a manifest's entry."""
    return path.stat().st_size == entry.bytes and file_entry(path.parent, path).sha256 == entry.sha256


@dataclass(frozen=True)
class Address:
    """The place of one step's result in a workspace."""

    step: str
    stage: str | None
    key: str

    @property
    def prefix(self) -> str:
        """The folder, relative to the workspace's root."""
        return f"{self.step}/{self.key}"


def step_key(spec: StepSpec, recipe: Recipe, *, stage: str | None, inputs: Mapping[str, Manifest], sources: Any = None) -> str:
    """First 16 hex of sha256(step, version, its recipe sections, input content digests, what the sources hold)."""
    paths = [path.format(stage=stage) for path in spec.sections]
    document = {
        "step": spec.name,
        "version": spec.version,
        "stage": stage,
        "recipe": {path: section(recipe, path) for path in paths},
        "inputs": {name: manifest.content_digest for name, manifest in inputs.items()},
        "sources": sources,
    }
    return canonical_digest(document)[:KEY_LENGTH]


def read_input(text: str, site: Site) -> tuple[str, Manifest]:
    """The name and the manifest in `NAME=PATH` or `NAME=URI`. Raises UserError for another form, or a file that cannot be read."""
    name, equals, place = text.partition("=")
    if not equals or not name or not place:
        raise UserError(f"--input {text!r}: found no NAME=MANIFEST; an example is --input captions=/tmp/captions.json")
    if "://" in place:
        folder, _, file = place.rpartition("/")
        return name, parse_manifest(open_storage(folder, site.s3).get(file), place)
    try:
        return name, parse_manifest(Path(place).read_bytes(), place)
    except OSError as error:
        raise UserError(f"--input {name}: {place} cannot be read ({error.strerror})") from error


def check_inputs(spec: StepSpec, *, stage: str | None, recipe: Recipe, inputs: Mapping[str, Manifest]) -> None:
    """Raises UserError when a stage or an input is missing, unknown or of the wrong kind."""
    if spec.staged and stage not in (allowed := spec.stages or recipe.stages):
        raise UserError(f"{spec.name}: found stage {stage!r}; allowed are {', '.join(allowed)}")
    if not spec.staged and stage is not None:
        raise UserError(f"{spec.name}: found stage {stage!r}; this step has no stages")
    for name in spec.inputs:
        if name not in inputs:
            raise UserError(f"{spec.name}: input {name} is missing; it takes {', '.join(spec.inputs)}")
    for name in inputs:
        if name not in (*spec.inputs, *spec.optional):
            raise UserError(f"{spec.name}: found an input {name}; it takes {', '.join((*spec.inputs, *spec.optional))}")


class Workspace:
    """The results of all runs at one site."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.storage: Storage = open_storage(site.workspace_uri, site.s3)

    @property
    def uri(self) -> str:
        """Root of the workspace."""
        return self.storage.uri

    def find(self, address: Address) -> Manifest | None:
        """The manifest of a finished step, or None."""
        path = f"{address.prefix}/{FILE_NAME}"
        try:
            return parse_manifest(self.storage.get(path), f"{self.uri}/{path}")
        except NotFoundError:
            return None

    def manifests(self) -> Iterator[tuple[str, Manifest]]:
        """Every manifest and its path in the workspace, sorted by path."""
        for entry in self.storage.list():
            if entry.path.endswith("/" + FILE_NAME) and entry.path.count("/") == 2:
                yield entry.path, parse_manifest(self.storage.get(entry.path), f"{self.uri}/{entry.path}")

    @contextmanager
    def attempt(self, address: Address, name: str) -> Iterator[Path]:
        """The empty local folder of one attempt, as a context: on the disk of the result, or in scratch for a remote workspace.

        The folders of other attempts are removed, for the holder of the claim is the only one that may go on; checkpoints stay.
        """
        near = self.storage.local_path(address.prefix)
        parent = near or self.site.scratch_folder / "output" / address.prefix
        with alone(parent, wait=False) as nobody_publishes:
            if nobody_publishes:
                for old in [entry for entry in parent.iterdir() if entry.name.startswith(ATTEMPT_PREFIX)]:
                    remove_tree(old)
        folder = parent / f"{ATTEMPT_PREFIX}{name}"
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            remove_tree(folder)
            if near is None:
                remove_empty(parent)

    def commit(
        self,
        address: Address,
        folder: Path,
        *,
        spec: StepSpec,
        recipe: Recipe,
        inputs: Mapping[str, Manifest],
        result: StepResult,
        confirm: Callable[[], None],
    ) -> Manifest:
        """Makes the files in an attempt's `folder` the step's result: hashes and stores them, then writes the manifest create-only.

        `confirm` raises when the step's claim is not held any more; nothing is changed then. When somebody else has committed
        this key meanwhile, theirs stands and is returned.
        """
        files = tuple(file_entry(folder, path) for path in sorted(folder.rglob("*")) if path.is_file())
        assert not any(is_private(entry.path.partition("/")[0]) for entry in files), "a result's files have names of their own"
        manifest = Manifest(
            kind=spec.kind,
            step=address.step,
            stage=address.stage,
            key=address.key,
            uri=f"{self.uri}/{address.prefix}",
            files=files,
            parents=tuple(
                Parent(name=name, step=parent.step, key=parent.key, digest=parent.digest) for name, parent in sorted(inputs.items())
            ),
            recipe_digest=recipe.digest(),
            code=result.code,
            stats=result.stats,
            mlflow=result.mlflow,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if not publish(self.storage, address.prefix, folder, files=files, manifest=manifest.to_bytes(), confirm=confirm):
            theirs = self.find(address)
            assert theirs is not None, "publish says that there is one"
            manifest = theirs
        if self.storage.local_path(address.prefix) is None:
            clear_unnamed(self.storage, address.prefix, named=manifest.files)
        return manifest


@dataclass(frozen=True)
class StepResult:
    """What a finished step says beside its files."""

    stats: dict[str, Any]
    code: Code
    mlflow: TrackedRun = field(default_factory=TrackedRun)
