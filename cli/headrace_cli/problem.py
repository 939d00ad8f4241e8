"""The one place where errors become lines for people and an exit code. No command prints a traceback."""

import errno
import os
import traceback
from enum import IntEnum

from headrace_api.errors import ManifestError
from headrace_cli.records import Damaged

_TRACEBACK = "HEADRACE_TRACEBACK"


class ExitCode(IntEnum):
    """Exit codes."""

    COMPLETE = 0
    FAILED = 1
    INVALID = 2
    """The request is invalid: a manifest, a name, a home."""
    SUSPENDED = 130


class Problem(Exception):
    """An error message for the user; ends the command.

    Attributes:
        code: the exit code.
    """

    def __init__(self, message: str, *, code: ExitCode = ExitCode.INVALID) -> None:
        super().__init__(message)
        self.code = code


def explain(error: Exception) -> tuple[list[str], ExitCode]:
    """The lines to print for an error, one per problem, and the exit code."""
    if isinstance(error, Problem):
        return [str(error)], error.code
    if isinstance(error, ManifestError):
        return error.problems, ExitCode.INVALID
    if isinstance(error, Damaged):
        return [str(error)], ExitCode.FAILED
    if isinstance(error, OSError):
        return [f"{error.filename or 'the system'}: {_remedy(error)}"], _code(error)
    if os.environ.get(_TRACEBACK):
        return traceback.format_exception(error), ExitCode.FAILED
    said = " ".join(str(error).split())[:300]
    return [f"{type(error).__name__}: {said}: a bug in headrace; set {_TRACEBACK}=1 to see where"], ExitCode.FAILED


def _remedy(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "no space left on the device: free some, then run the same command again"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return f"{error.strerror}: make it writable, or choose another folder with --home"
        case errno.ENOTDIR | errno.EEXIST:
            return "a file is where a folder is needed: move it, or choose another folder with --home"
        case errno.ENOENT:
            return "no such file or folder; was it removed meanwhile?"
    return error.strerror or str(error)


def _code(error: OSError) -> ExitCode:
    unusable = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
    return ExitCode.INVALID if error.errno in unusable else ExitCode.FAILED
