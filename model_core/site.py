"""Where to run it: workspace, storage, tracking, images and launch profiles. Data only, and never part of a key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from model_core.documents import UserError, describe, read_document
from model_core.steps.registry import STEPS
from model_core.storage.settings import S3Settings


class Section(BaseModel):
    """A part of a site: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Tracking(Section):
    """MLflow. `uri` None keeps the history in an SQLite file of the workspace (local workspaces only)."""

    uri: str | None = None
    experiment: str = Field("darkroom", min_length=1)

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str | None) -> str | None:
        if uri is not None and uri.partition("://")[0] not in ("http", "https", "sqlite", "postgresql+psycopg2"):
            raise ValueError(f"found {uri!r}; allowed are http://, https://, sqlite:/// and postgresql+psycopg2://")
        return uri


class Rewards(Section):
    """Where align_grpo has its rewards from. `uri` None scores in the step's own process."""

    uri: Annotated[str, Field(pattern=r"^https?://(\[[0-9a-fA-F:]+\]|[^/:\s]+)(:\d+)?(/\S*)?$")] | None = None  # of a reward service
    timeout_seconds: Annotated[float, Field(gt=0.0)] = 120.0  # the longest silence of a request that the service has
    patience_seconds: Annotated[float, Field(ge=0.0)] = 900.0  # how long a request is sent again before the step ends; 0: sent once


class LaunchProfile(Section):
    """How a step's processes are started."""

    scheduler: Literal["local_cwd"] = "local_cwd"
    processes: Annotated[int, Field(ge=1)] = 1  # ranks, started by torchrun; only training steps take more than one
    threads: Annotated[int, Field(ge=1)] | None = None  # CPU threads a process; None shares out the cores at hand
    shard: Literal["none", "fsdp", "hsdp"] = "none"  # of train_mmdit: weights whole on each rank, over all ranks, or within a machine
    context_parallel: Annotated[int, Field(ge=1)] = 1  # of train_mmdit: ranks that share each stream's tokens
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # of train_mmdit: what is computed again to save memory
    compile: bool = False  # of train_mmdit: blocks through torch.compile
    reward_service: bool = False  # of align_grpo: a reward service is started beside it, on the same machine
    loader_workers: Annotated[int, Field(ge=0)] = 1  # threads a process that make batches ahead; 0 makes each when it is needed

    @model_validator(mode="after")
    def _context_divides(self) -> LaunchProfile:
        if self.processes % self.context_parallel:
            raise ValueError(f"context_parallel: found {self.context_parallel}; allowed are divisors of the {self.processes} processes")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether each rank has all weights and whole streams."""
        return self.shard == "none" and self.context_parallel == 1

    @property
    def layout(self) -> str:
        """What a message says of it."""
        return f"found shard {self.shard} and context_parallel {self.context_parallel}"


class Launch(Section):
    """The default profile, and others for single steps."""

    default: LaunchProfile = LaunchProfile()
    steps: dict[str, LaunchProfile] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _steps_can_do_so(self) -> Launch:
        parallel = [name for name, spec in STEPS.items() if spec.parallel]
        alone = f"allowed is 1, more are for {' and '.join(parallel)} alone"
        if self.default.processes > 1:
            raise ValueError(f"default: found {self.default.processes} processes; {alone}, under steps")
        if self.default.reward_service:
            raise ValueError("default: found reward_service true; allowed is false, it is for steps.align_grpo alone")
        if not self.default.is_whole:
            raise ValueError(f"default: {self.default.layout}; allowed are none and 1, others are for steps.train_mmdit alone")
        for name, profile in self.steps.items():
            if name not in STEPS:
                raise ValueError(f"steps: found {name!r}; allowed are {', '.join(STEPS)}")
            if profile.processes > 1 and name not in parallel:
                raise ValueError(f"steps.{name}: found {profile.processes} processes; {alone}")
            if name != "train_mmdit" and not profile.is_whole:
                raise ValueError(f"steps.{name}: {profile.layout}; allowed are none and 1, others are for steps.train_mmdit alone")
            if profile.reward_service and name != "align_grpo":
                raise ValueError(f"steps.{name}: found reward_service true; allowed is false, it is for steps.align_grpo alone")
        return self

    def profile(self, step: str) -> LaunchProfile:
        """The profile of one step."""
        return self.steps.get(step, self.default)


class Site(Section):
    """One place to run at."""

    workspace: str = "./workspace"  # folder, file:///folder or s3://bucket/prefix
    scratch: str | None = None  # local folder for work in progress; None: beside a local workspace, else the user's cache
    s3: S3Settings = S3Settings()
    tracking: Tracking = Tracking()
    rewards: Rewards = Rewards()
    image: str = "python:3.11"  # of every step, by digest on a cluster
    launch: Launch = Launch()

    @field_validator("workspace")
    @classmethod
    def _known_workspace(cls, workspace: str) -> str:
        scheme, separator, rest = workspace.partition("://")
        if not workspace or (separator and (scheme not in ("file", "s3") or not rest)):
            raise ValueError(f"found {workspace!r}; allowed are a folder, file:///FOLDER and s3://BUCKET/PREFIX")
        return workspace

    @property
    def workspace_uri(self) -> str:
        """The workspace as a file:// or s3:// uri."""
        if "://" in self.workspace:
            return self.workspace.rstrip("/")
        return f"file://{Path(self.workspace).expanduser().resolve()}"  # as it is: nothing reads %20 back

    @property
    def scratch_folder(self) -> Path:
        """Where work in progress lies on this machine."""
        if self.scratch is not None:
            return Path(self.scratch).expanduser().resolve()
        if self.workspace_uri.startswith("file://"):
            return Path(unquote(self.workspace_uri.removeprefix("file://"))) / ".scratch"
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        return cache / "darkroom" / self.workspace_uri.removeprefix("s3://").replace("/", "--")

    @property
    def spool_folder(self) -> Path:
        """Where what is to be told to MLflow waits."""
        return self.scratch_folder / "spool"

    @property
    def tracking_uri(self) -> str:
        """The MLflow uri, the workspace's own SQLite file when none is set."""
        return self.tracking.uri or f"sqlite:///{self.scratch_folder / 'mlflow.db'}"


def parse_site(document: dict[str, Any], where: str) -> Site:
    """A Site from a plain mapping; raises UserError that names `where` and the field."""
    try:
        return Site.model_validate(document)
    except ValidationError as error:
        raise UserError(describe(error, where)) from error


def load_site(path: Path) -> Site:
    """The site in a YAML file; raises UserError for any mistake."""
    return parse_site(read_document(path, "site"), f"site {path}")
