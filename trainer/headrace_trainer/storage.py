"""Object storage on a directory or on S3, behind one small interface.

Keys are relative to the store's root and use ``/``. A file appears under its key whole or not at all. Every failure is
a ``StorageError`` that names the address and the remedy.
"""

import errno
import functools
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from headrace_api.run import Storage
from headrace_trainer import board
from headrace_trainer.errors import StorageError, UserError

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """An object in a listing."""

    key: str
    bytes: int


class ObjectStore(Protocol):
    """The interface shared by directories and buckets."""

    uri: str

    def put_file(self, key: str, path: Path) -> None:
        """Store a local file under ``key``."""

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store ``data`` under ``key``."""

    def get_file(self, key: str, path: Path) -> None:
        """Download ``key`` to a local file."""

    def get_bytes(self, key: str) -> bytes:
        """The content of ``key``."""

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Objects whose keys start with ``prefix``, sorted by key."""

    def exists(self, key: str) -> bool:
        """Whether ``key`` exists."""

    def delete(self, prefix: str) -> None:
        """Delete every object whose key starts with ``prefix``."""

    def local_path(self, key: str) -> Path | None:
        """Where ``key`` can be read without copying it, or None."""


def open_store(storage: Storage) -> ObjectStore:
    """The store of a run.

    Raises:
        UserError: ``storage.uri`` is unset or has an unknown scheme.
    """
    if storage.uri is None:
        raise UserError("storage.uri: unset: write s3://bucket/prefix or a directory")
    return open_uri(storage.uri, storage)


def open_uri(uri: str, storage: Storage) -> ObjectStore:
    """A store rooted at ``uri``, with the endpoint, region and credentials of ``storage``."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return DirectoryStore(Path(rest if separator else uri))
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        return S3Store(bucket, prefix.strip("/"), endpoint=storage.endpoint, region=storage.region)
    raise UserError(f"uri: {uri!r}: unknown scheme {scheme!r}: write s3://bucket/prefix or a directory")


_STAGED = ".staged-"
"""Prefix of the names of files that are still being written."""


class DirectoryStore:
    """Objects as files below a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.uri = str(self.root)

    def put_file(self, key: str, path: Path) -> None:
        with self._replacing(key) as staged:
            shutil.copyfile(path, staged)

    def put_bytes(self, key: str, data: bytes) -> None:
        with self._replacing(key) as staged:
            staged.write_bytes(data)

    def get_file(self, key: str, path: Path) -> None:
        with _as_storage_errors(f"{self.uri}/{key}"):
            shutil.copyfile(self.root / key, path)

    def get_bytes(self, key: str) -> bytes:
        with _as_storage_errors(f"{self.uri}/{key}"):
            return (self.root / key).read_bytes()

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        with _as_storage_errors(f"{self.uri}/{prefix}"):
            # Walk only the folder named by the prefix: the store may be large.
            folder = self.root / prefix.rpartition("/")[0]
            found = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(_STAGED))
            keys = ((p.relative_to(self.root).as_posix(), p.stat().st_size) for p in found)
            return [ObjectInfo(key=k, bytes=size) for k, size in sorted(keys) if k.startswith(prefix)]

    def exists(self, key: str) -> bool:
        return (self.root / key).is_file()

    def delete(self, prefix: str) -> None:
        with _as_storage_errors(f"{self.uri}/{prefix}"):
            for info in self.list(prefix):
                path = self.root / info.key
                path.unlink(missing_ok=True)
                _remove_empty_parents(path.parent, stop=self.root)
            if prefix.endswith("/"):
                for path in list((self.root / prefix).rglob(f"{_STAGED}*")):  # left by killed writers
                    path.unlink(missing_ok=True)
                    _remove_empty_parents(path.parent, stop=self.root)

    def local_path(self, key: str) -> Path | None:
        return self.root / key

    @contextmanager
    def _replacing(self, key: str) -> Iterator[Path]:
        """A temporary path beside ``key``. It replaces ``key`` if the block succeeds, and is deleted otherwise."""
        final = self.root / key
        staged = final.with_name(f"{_STAGED}{uuid.uuid4().hex}")
        with _as_storage_errors(str(final)):
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield staged
                with staged.open("rb") as file:
                    os.fsync(file.fileno())
                staged.replace(final)
            finally:
                staged.unlink(missing_ok=True)


class S3Store:
    """Objects below a prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str, *, endpoint: str | None, region: str | None) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._connect = functools.partial(_s3_client, endpoint, region)
        self._connected = os.getpid(), self._connect()

    @property
    def _client(self) -> "S3Client":
        """This process's client: a forked process must not use its parent's connections."""
        pid, client = self._connected
        if pid != os.getpid():
            client = self._connect()
            self._connected = os.getpid(), client
        return client

    def put_file(self, key: str, path: Path) -> None:
        with _as_storage_errors(f"{self.uri}/{key}"):
            self._client.upload_file(str(path), self.bucket, self._key(key), Callback=_moved)

    def put_bytes(self, key: str, data: bytes) -> None:
        with _as_storage_errors(f"{self.uri}/{key}"):
            self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def get_file(self, key: str, path: Path) -> None:
        with _as_storage_errors(f"{self.uri}/{key}"):
            self._client.download_file(self.bucket, self._key(key), str(path), Callback=_moved)

    def get_bytes(self, key: str) -> bytes:
        with _as_storage_errors(f"{self.uri}/{key}"):
            return self._client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        with _as_storage_errors(f"{self.uri}/{prefix}"):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            objects = [o for page in pages for o in page.get("Contents", [])]
        skip = len(self.prefix) + 1 if self.prefix else 0
        return [ObjectInfo(key=o["Key"][skip:], bytes=o["Size"]) for o in objects if not o["Key"].endswith("/")]

    def exists(self, key: str) -> bool:
        return any(info.key == key for info in self.list(key))

    def delete(self, prefix: str) -> None:
        keys = [{"Key": self._key(info.key)} for info in self.list(prefix)]
        with _as_storage_errors(f"{self.uri}/{prefix}"):
            for i in range(0, len(keys), 1000):
                batch: Any = {"Objects": keys[i : i + 1000], "Quiet": True}
                self._client.delete_objects(Bucket=self.bucket, Delete=batch)

    def local_path(self, key: str) -> Path | None:
        return None

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key


def _moved(_num_bytes: int) -> None:
    """Bytes were transferred, so this rank is not hung."""
    board.beat()


def _s3_client(endpoint: str | None, region: str | None) -> "S3Client":
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "max_attempts": 5},
        connect_timeout=5,
        read_timeout=60,
        # S3-compatible servers may answer ranged reads without the whole object's checksum.
        response_checksum_validation="when_required",
        request_checksum_calculation="when_required",
        s3={"addressing_style": "path"} if endpoint else {},
    )
    return boto3.client("s3", endpoint_url=endpoint, region_name=region or "us-east-1", config=config)


@contextmanager
def _as_storage_errors(address: str) -> Iterator[None]:
    """Turn errors of the file system and boto3 into a ``StorageError`` that names ``address``."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{address}: {_remedy(error)}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in {"botocore", "boto3", "s3transfer", "urllib3"}:
            raise
        raise StorageError(f"{address}: {error}: check storage.uri, storage.endpoint and the credentials") from error


def _remedy(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "no space left on the device: free some, or point storage.uri elsewhere"
    if error.errno == errno.ENOENT:
        return "not found: was it removed? rerun the stage that makes it"
    return f"{error.strerror or error}: check that the address exists and is writable"


def _remove_empty_parents(folder: Path, *, stop: Path) -> None:
    while folder != stop and stop in folder.parents and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
