"""How the ranks of a gang find one another: rank 0 serves a store at ``MASTER_ADDR:MASTER_PORT``, and all sign in.

Out: the store, once every rank is there; process groups are then made without waiting for anybody. A rank that is
missing is named, after a bounded time.
"""

import os
import time
from datetime import timedelta

import torch.distributed as dist

from headrace_trainer import board
from headrace_trainer.errors import PeersMissing

_JOIN_VARIABLE = "HEADRACE_JOIN_SECONDS"
_JOIN_SECONDS = 900.0
"""Until the slowest node has pulled its image and imported: pods of a gang do not start together."""
_POLL_SECONDS = 0.1
_TRY_SECONDS = 5.0
_TELL_SECONDS = 1.0
_COUNT, _MISSING = "headrace/joined", "headrace/missing"
_NOBODY = "nobody"
_SHOWN = 8


def meet(*, rank: int, world: int) -> dist.Store:
    """Wait for all ranks; whoever waits beats.

    Raises:
        PeersMissing: some did not come in ``HEADRACE_JOIN_SECONDS``.
    """
    if world == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    seconds = float(os.environ.get(_JOIN_VARIABLE, _JOIN_SECONDS))
    store = _serve(world) if rank == 0 else _connect(world, seconds=seconds)
    store.set(f"headrace/{rank}", "here")
    store.add(_COUNT, 1)
    missing = _count(store, world, seconds=seconds) if rank == 0 else _hear(store)
    if missing != _NOBODY:
        raise PeersMissing(f"{missing} did not join within {seconds:.0f} s: see how their pods are")
    return store


def _serve(world: int) -> dist.TCPStore:
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=True,
        wait_for_workers=False,
    )


def _connect(world: int, *, seconds: float) -> dist.TCPStore:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + seconds
    while True:
        board.beat()
        try:
            return dist.TCPStore(
                address,
                port,
                world,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=_TRY_SECONDS),
            )
        except dist.DistError as error:  # it does not listen yet, or has no name yet
            if time.monotonic() > deadline:
                raise PeersMissing(f"rank 0 at {address}:{port} did not answer within {seconds:.0f} s") from error
            time.sleep(_POLL_SECONDS)


def _count(store: dist.Store, world: int, *, seconds: float) -> str:
    """Wait until all have signed in, and tell the others; who is missing."""
    deadline, missing = time.monotonic() + seconds, _NOBODY
    while store.add(_COUNT, 0) < world and missing == _NOBODY:
        board.beat()
        time.sleep(_POLL_SECONDS)
        if time.monotonic() > deadline:
            missing = _name([r for r in range(world) if not store.check([f"headrace/{r}"])])
    store.set(_MISSING, missing)
    if missing != _NOBODY:
        time.sleep(_TELL_SECONDS)  # the store ends with this process
    return missing


def _name(absent: list[int]) -> str:
    if not absent:
        return _NOBODY
    shown = ", ".join(map(str, absent[:_SHOWN]))
    rest = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
    return f"rank {shown}" if len(absent) == 1 else f"ranks {shown}{rest}"


def _hear(store: dist.Store) -> str:
    """Wait for rank 0 to say who is missing. If it dies, so does the connection."""
    while True:
        board.beat()
        try:
            store.wait([_MISSING], timedelta(seconds=_TRY_SECONDS))
            return store.get(_MISSING).decode()
        except dist.DistStoreError:
            continue
