"""How long to wait after failures: nothing, then twice as long each time, up to a bound. Pure."""


def backoff_seconds(failures: int, *, first_seconds: float, longest_seconds: float) -> float:
    """The wait after so many failures in a row; none after none."""
    return min(first_seconds * 2.0 ** min(failures - 1, 30), longest_seconds) if failures > 0 else 0.0
