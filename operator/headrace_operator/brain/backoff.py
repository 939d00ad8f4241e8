"""Exponential back-off. Pure."""


def backoff_seconds(failures: int, *, first_seconds: float, longest_seconds: float, jitter: float = 0.0) -> float:
    """The delay after a number of consecutive failures; 0 after none.

    Args:
        failures: consecutive failures.
        first_seconds: the delay after the first failure; doubles with each further one.
        longest_seconds: the upper bound.
        jitter: from 0 to 1; shortens the delay by up to half, to spread retries.
    """
    if failures <= 0:
        return 0.0
    return min(first_seconds * 2.0 ** min(failures - 1, 30), longest_seconds) * (1 - jitter / 2)
