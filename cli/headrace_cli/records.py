"""Small files shared between processes: written atomically, read with damage in mind."""

import contextlib
import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)


class Damaged(Exception):
    """A record that is empty, truncated, or has values unknown to this version."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: damaged: {why}")


def write(path: Path, text: str, *, durable: bool) -> None:
    """Replace a file atomically: readers see the old or the new text. One writer at a time.

    Args:
        path: the file.
        text: its new content.
        durable: whether it must survive a power failure; costs an fsync.

    Raises:
        OSError: writing failed. Names the file, which is unchanged.
    """
    staged = path.with_name(f".{path.name}.new")
    try:
        with staged.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        staged.replace(path)
        if durable:
            _sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def read(path: Path, model: type[M]) -> M | None:
    """Read a record; None if there is none. Fields added by another version are dropped.

    Raises:
        Damaged: it is unreadable.
    """
    try:
        return model.model_validate_json(path.read_bytes(), extra="ignore")
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Damaged(path, f"{where}: {first['msg']}" if where else first["msg"]) from error


def read_if_whole(path: Path, model: type[M]) -> M | None:
    """Read a record; None if it is missing or damaged."""
    try:
        return read(path, model)
    except Damaged:
        return None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
