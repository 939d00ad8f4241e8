"""How the ranks of a gang find one another: rank 0 serves a store at ``MASTER_ADDR:MASTER_PORT``, and all sign in.

Out: the store, once every rank is there; process groups are then made without waiting for anybody. A rank that is
missing is named, after a bounded time.
"""

import os
import time
from datetime import timedelta

import torch.distributed as dist

from headrace_trainer import board

_JOIN_VARIABLE = "HEADRACE_JOIN_SECONDS"
_JOIN_SECONDS = 900.0
"""Until the slowest node has pulled its image and imported: pods of a gang do not start together."""
_POLL_SECONDS = 0.1
_TRY_SECONDS = 5.0
_COUNT, _COMPLETE = "headrace/joined", "headrace/complete"


class PeersMissing(RuntimeError):
    """Ranks of the gang that did not come in time."""


def meet(*, rank: int, world: int) -> dist.Store:
    """Wait for all ranks; whoever waits beats.

    Raises:
        PeersMissing: some did not come in ``HEADRACE_JOIN_SECONDS``.
    """
    if world == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    seconds = float(os.environ.get(_JOIN_VARIABLE, _JOIN_SECONDS))
    deadline = time.monotonic() + seconds
    store = _serve(world) if rank == 0 else _connect(world, deadline=deadline, seconds=seconds)
    store.set(f"headrace/{rank}", "here")
    store.add(_COUNT, 1)
    while not _is_complete(store, rank=rank, world=world):
        board.beat()
        if time.monotonic() > deadline:
            raise PeersMissing(f"{_missing(store, world)} did not join within {seconds:.0f} s: see how their pods are")
    return store


def _serve(world: int) -> dist.TCPStore:
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=True,
        wait_for_workers=False,
    )


def _connect(world: int, *, deadline: float, seconds: float) -> dist.TCPStore:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
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


def _is_complete(store: dist.Store, *, rank: int, world: int) -> bool:
    """Whether all have signed in: rank 0 counts, the others wait a while for it to say so."""
    if rank == 0:
        if store.add(_COUNT, 0) == world:
            store.set(_COMPLETE, "yes")
            return True
        time.sleep(_POLL_SECONDS)
        return False
    try:
        store.wait([_COMPLETE], timedelta(seconds=_TRY_SECONDS))
    except dist.DistStoreError:
        return False
    return True


def _missing(store: dist.Store, world: int) -> str:
    absent = [str(r) for r in range(world) if not store.check([f"headrace/{r}"])]
    return f"rank {absent[0]}" if len(absent) == 1 else f"ranks {', '.join(absent)}"
