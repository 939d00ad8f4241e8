"""Human-readable figures: ``1.2B`` parameters, ``13.5 GB``, ``1h1m``. Machine-readable output keeps full precision."""

import math
from itertools import dropwhile

_UNKNOWN = "?"
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTES = ((1e15, " PB"), (1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"))
_TIMES = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


def people_count(number: float) -> str:
    """Parameters, tokens, documents: ``1234567`` as ``1.2M``, ``140e9`` as ``140B``."""
    return _scaled(number, _COUNTS, unit="")


def people_bytes(number: float) -> str:
    """``7_300_000`` as ``7.3 MB``, in powers of ten."""
    return _scaled(number, _BYTES, unit=" bytes")


def people_time(seconds: float) -> str:
    """``3700`` as ``1h1m``: the two largest units."""
    if not math.isfinite(seconds):
        return _UNKNOWN
    left = max(0, round(seconds))
    parts = []
    for size, unit in _TIMES:
        count, left = divmod(left, size)
        parts.append((count, unit))
    largest = list(dropwhile(lambda part: part[0] == 0, parts))
    return "".join(f"{count}{unit}" for count, unit in largest[:2] if count) or "0s"


def _scaled(number: float, units: tuple[tuple[float, str], ...], *, unit: str) -> str:
    if not math.isfinite(number):
        return _UNKNOWN
    for bound, suffix in units:
        # A value that rounds up to the next unit uses it: 999,960 is 1M, not 1000k.
        if abs(number) >= bound * (1 - 5e-5):
            return f"{number / bound:.1f}".removesuffix(".0") + suffix
    return f"{number:.0f}{unit}"
