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
    connect_timeout_seconds: Seconds = 5.0
    read_timeout_seconds: Seconds = 60.0  # between two pieces of an answer, not for the whole of it
    max_attempts: Annotated[int, Field(ge=1)] = 5  # of one request, the first included; back-off is botocore's "standard"
    multipart_bytes: Annotated[int, Field(ge=5 * MiB)] = 16 * MiB  # larger files go in parts of this size; S3 allows no part below 5 MiB
