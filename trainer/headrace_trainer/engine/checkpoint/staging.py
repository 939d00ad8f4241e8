"""A copy of this rank's state in memory that forks share, on machines without a GPU.

A fork sees the memory of its parent for nothing, but the parent pays for every page that it writes to afterwards: about
six times as much as a copy into memory that is there already (see docs/design/0005). So the state is copied once a save,
and forks leave out the state itself.
"""

import ctypes
import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

_ALIGNMENT = 64
_SMALLEST_LEFT_OUT = 1 << 20
"""Bytes: what is smaller is not worth two system calls."""
_DONTFORK, _DOFORK = 10, 11  # MADV_ in linux/mman.h


class Staging:
    """Holds one copy at a time; the memory is kept for the next one."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None

    def hold(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of CPU tensors, until the next call.

        Returns:
            The copies, in the same order; each is a storage of its own.
        """
        offsets, end = [], 0
        for tensor in tensors:
            offsets.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._memory is None or len(self._memory) < end:
            # Shared: the pages of private memory would be touched one by one again after every fork.
            self._memory = mmap.mmap(-1, max(end, mmap.PAGESIZE))
        memory = self._memory
        return [_copy(tensor, memory, offset) for tensor, offset in zip(tensors, offsets, strict=True)]


def _copy(tensor: torch.Tensor, memory: mmap.mmap, offset: int) -> torch.Tensor:
    if tensor.numel() == 0:
        return tensor
    held = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return held.copy_(tensor)


@contextmanager
def left_out_of_forks(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Processes that are forked in this block have no memory where these CPU tensors are, and must not touch them."""
    pages = [found for tensor in tensors if (found := _pages(tensor)) is not None]
    _advise(pages, _DONTFORK)
    try:
        yield
    finally:
        _advise(pages, _DOFORK)


def _pages(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Address and length of the whole pages of a tensor's storage."""
    storage = tensor.untyped_storage()
    if tensor.device.type != "cpu" or storage.nbytes() < _SMALLEST_LEFT_OUT:
        return None
    first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    return first, (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE - first


def _advise(pages: list[tuple[int, int]], advice: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for address, length in pages:
        # Where the kernel refuses, the fork is only slower.
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice)
