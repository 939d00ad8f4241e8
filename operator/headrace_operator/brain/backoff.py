"""How long to wait after failures: nothing, then twice as long each time, up to a bound. Pure."""


def backoff_seconds(failures: int, *, first_seconds: float, longest_seconds: float, jitter: float = 0.0) -> float:
    """The wait after so many failures in a row; none after none.

    Args:
        failures: in a row.
        first_seconds: the wait after the first.
        longest_seconds: the longest wait.
        jitter: between 0 and 1; spreads those that failed together over half of the wait.
    """
    if failures <= 0:
        return 0.0
    return min(first_seconds * 2.0 ** min(failures - 1, 30), longest_seconds) * (1 - jitter / 2)
