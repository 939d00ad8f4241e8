"""Python's garbage collector runs between steps only, at the same steps on every rank.

Left to itself it runs in the middle of a step, on one rank at a time, and all others wait for that rank.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_EVERY = 50
"""Steps between collections."""


@contextmanager
def collected_between_steps() -> Iterator[None]:
    """Collect only where ``collect_after`` does, for as long as the block runs; what is there now is never looked at."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def collect_after(step: int) -> None:
    """Collect, if it is time to after this step."""
    if step % _EVERY == 0:
        gc.collect()
