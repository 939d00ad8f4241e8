"""Work in a copy of this process, while this one goes on.

A fork sees all memory as it was at its moment, whatever changes afterwards, but for what is left out of it. It dies with its
rank, so that nothing goes on writing for a gang that is gone.
"""

import contextlib
import gc
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import IO, Any, Generic, TypeVar

import torch

from headrace_trainer import board
from headrace_trainer.engine.checkpoint.staging import left_out_of_forks
from headrace_trainer.errors import StorageError
from headrace_trainer.processes import die_with_parent

T = TypeVar("T")


class Background(Generic[T]):
    """``work`` in a forked process, from now on.

    Args:
        work: what to do. It must not use CUDA, nor connections that the rank has open. What it returns is pickled.
        without: large tensors that the work does not touch: this process pays for each page of others that it writes to.
    """

    def __init__(self, work: Callable[[], T], *, without: Iterable[torch.Tensor]) -> None:
        # In memory: a full disk must not hide how it ended.
        self._outbox = os.fdopen(os.memfd_create("headrace-outbox"), "w+b", buffering=0)
        self._exit_code: int | None = None
        self._counter = board.Counter()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        with left_out_of_forks(without):
            self._pid = os.fork()
            if self._pid == 0:
                _run(work, self._outbox, self._counter, parent=parent)

    @property
    def beats(self) -> int:
        """Grows while the work moves on."""
        return self._counter.beats

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._wait(os.WNOHANG)

    def result(self) -> T:
        """What ``work`` returned; waits for it.

        Raises:
            StorageError: it raised an error, or was killed.
        """
        self._wait(0)
        outcome: Any = StorageError(f"a checkpoint's writer ended with exit code {self._exit_code}: see its log above")
        if self._exit_code == 0:
            self._outbox.seek(0)
            outcome = pickle.loads(self._outbox.read())
        self._outbox.close()
        if isinstance(outcome, StorageError):
            raise outcome
        result: T = outcome
        return result

    def _wait(self, options: int) -> bool:
        if self._exit_code is None:
            pid, status = os.waitpid(self._pid, options)
            if pid != 0:
                self._exit_code = os.waitstatus_to_exitcode(status)
        return self._exit_code is not None


def _run(work: Callable[[], Any], outbox: IO[bytes], counter: board.Counter, *, parent: int) -> None:
    code = 1
    try:
        die_with_parent()
        if os.getppid() != parent:
            os._exit(code)
        board.beat_on(counter)
        gc.disable()  # what the rank has on a GPU is not this process's to free
        torch.set_num_threads(1)  # the threads that OpenMP counts on were not forked
        outbox.write(pickle.dumps(_outcome(work)))
        code = 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except StorageError as error:
        return error
    except OSError as error:
        return StorageError(f"{error}: check the scratch volume and storage.uri")
