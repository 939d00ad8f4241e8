"""Errors that map to fault classes; any other exception counts as a process fault."""

from headrace_api.faults import ExitCode, FaultClass


class UserError(ValueError):
    """Bad configuration or data. The message names the field or file, the value and the remedy."""


class StorageError(Exception):
    """Storage did not answer, is full, or holds corrupt data."""


class PeersMissing(Exception):
    """Ranks of the gang did not join in time."""


class Stopped(Exception):
    """Stopped on request, with the work saved.

    Attributes:
        step: the saved step.
    """

    def __init__(self, message: str, *, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


def fault_of(error: BaseException) -> tuple[FaultClass, ExitCode]:
    """The fault class and exit code for an exception that ended a rank."""
    if isinstance(error, Stopped):
        return FaultClass.STOPPED, ExitCode.STOPPED
    if isinstance(error, UserError):
        return FaultClass.USER, ExitCode.USER
    if isinstance(error, StorageError | OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return FaultClass.STORAGE, ExitCode.STORAGE
    return FaultClass.PROCESS, ExitCode.PROCESS
