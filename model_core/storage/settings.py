"""How an S3 server is reached. Credentials are not here: they come from the AWS chain only (environment, profile, pod role)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MiB = 1 << 20
Seconds = Annotated[float, Field(gt=0.0)]


class S3Settings(BaseModel):
    """Settings of one S3 endpoint; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint_url: Annotated[str, Field(pattern=r"^https?://")] | None = None  # None: AWS_ENDPOINT_URL, else AWS itself
    region: str | None = None  # None: AWS_DEFAULT_REGION or the profile, else us-east-1
    addressing_style: Literal["path", "virtual"] = "path"  # what servers other than AWS understand
    checksum_mode: Literal["when_required", "when_supported"] = "when_required"  # third-party stores fail on the newer default
    connect_timeout_seconds: Seconds = 5.0  # also the longest stall while a request is sent
    read_timeout_seconds: Seconds = 60.0  # between two pieces of an answer, not for the whole of it
    retry_seconds: Annotated[float, Field(ge=0.0)] = 60.0  # how long a request is repeated while the server is away; 0: sent once
    # Larger files go in parts of this size, five of them in memory at once; S3 allows no part below 5 MiB.
    multipart_bytes: Annotated[int, Field(ge=5 * MiB, le=1024 * MiB)] = 16 * MiB
