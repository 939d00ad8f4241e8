"""Where a run keeps its artifacts, and which URIs mean the same in every working directory."""

from typing import Annotated

from pydantic import Field

from headrace_api.base import Matches, ObjectName, Spec, StoredUri

NO_STORAGE = "storage.uri is unset: write s3://bucket/prefix, or a directory that every pod mounts"
RELATIVE = "is relative, but a pod has no folder that it could be relative to: write s3://bucket/prefix or /folder"


def cel_is_absolute(uri: str) -> str:
    """``is_absolute`` in CEL."""
    return f"({uri}.startsWith('/') || {uri}.contains('://'))"


def is_absolute(uri: str) -> bool:
    """Whether a ``StoredUri`` means the same in every working directory."""
    return uri.startswith("/") or "://" in uri


class SecretRef(Spec):
    """A Secret in the run's namespace."""

    name: ObjectName
    """name is the Secret's name; its keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY become environment variables."""


class Storage(Spec):
    """Where artifacts and checkpoints are kept: a directory or an S3 bucket."""

    uri: StoredUri | None = None
    """uri is s3://bucket/prefix or a directory that every pod mounts; a local run defaults to its own folder."""
    endpoint: Annotated[str, Matches(r"^https?://[!-~]+$", "write http://host:port or https://host")] | None = Field(
        None, max_length=256
    )
    """endpoint is the URL of an S3-compatible server; Amazon S3 if unset."""
    region: Annotated[str, Matches(r"^[A-Za-z0-9][A-Za-z0-9._-]*$", "write a name, such as us-east-1")] | None = Field(
        None, max_length=64
    )
    """region is the bucket's region."""
    secret_ref: SecretRef | None = None
    """secretRef names the Secret that holds the credentials; a local run uses the usual AWS environment variables."""
