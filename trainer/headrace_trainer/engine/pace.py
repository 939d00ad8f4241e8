"""How fast it goes: tokens a second over the last few steps, and when it will be done."""

import time
from collections import deque
from collections.abc import Callable

_WINDOW = 20


class Pace:
    """A clock that is told of every step.

    Args:
        tokens_per_step: tokens in a global batch.
        clock: seconds from any origin.
    """

    def __init__(self, tokens_per_step: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tokens, self._clock = tokens_per_step, clock
        self._seconds: deque[float] = deque(maxlen=_WINDOW)
        self._last = clock()

    def restart(self) -> None:
        """Begin the next step's time now: saving and validation are not training."""
        self._last = self._clock()

    def step(self) -> None:
        """A step has ended."""
        now = self._clock()
        self._seconds.append(now - self._last)
        self._last = now

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of the whole gang a second, over the last steps; None before the first."""
        spent = sum(self._seconds)
        return self._tokens * len(self._seconds) / spent if spent > 0 else None

    def seconds_for(self, steps: int) -> float | None:
        """Seconds that ``steps`` more steps take at this pace."""
        speed = self.tokens_per_second
        return steps * self._tokens / speed if speed else None
