"""A function in a process of its own, with a deadline: the work of the sections."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any


class PieceFailed(Exception):
    """A piece raised, died, or took too long; the message ends with what it said."""


class FreshProcesses:
    """Starts one process after the other.

    Args:
        on_gpu: a process that has looked for a GPU cannot be forked; without one, processes are forked from a server
            that has imported Megatron once.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._context: Any = multiprocessing.get_context("spawn" if on_gpu else "forkserver")
        if not on_gpu:
            self._context.set_forkserver_preload(["benchmarks.gpu.pieces", "headrace_trainer.stages.pretrain.stage"])
        self.deadline = float("inf")
        """When the present section must be over, by ``time.monotonic``."""

    def __call__(self, piece: Callable[..., Any], *args: Any) -> Any:
        """What ``piece`` returned in a process of its own.

        Raises:
            PieceFailed: it did not return in time.
        """
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_run, args=(sender, piece, args))
        process.start()
        sender.close()
        try:
            left = self.deadline - time.monotonic()
            if not receiver.poll(None if left == float("inf") else max(0.0, left)):
                raise PieceFailed(f"{piece.__name__}: not done in time")
            kind, value = pickle.loads(receiver.recv_bytes())
        except EOFError:
            process.join()
            raise PieceFailed(f"{piece.__name__}: died with exit code {process.exitcode}") from None
        finally:
            # What it started, an engine's workers say, goes with it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        if kind == "error":
            raise PieceFailed(f"{piece.__name__}: {value}")
        return value


def _run(sender: Any, piece: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)
    try:
        said = ("value", piece(*args))
    except BaseException as error:
        traceback.print_exc()
        said = ("error", "".join(traceback.format_exception(error))[-1500:])
    sender.send_bytes(pickle.dumps(said))
    sender.close()
    time.sleep(3600)  # its group is killed by whoever waits for it
