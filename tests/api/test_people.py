"""Human-readable figures."""

import pytest

from headrace_api.people import people_bytes, people_count, people_time


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1k"),
        (12_345, "12.3k"),
        (999_949, "999.9k"),
        (999_950, "1M"),
        (999_960, "1M"),
        (1_835_136, "1.8M"),
        (1.2e9, "1.2B"),
        (140e9, "140B"),
        (1.5e12, "1.5T"),
        (float("inf"), "?"),
        (float("nan"), "?"),
    ],
)
def test_counts(number, expected):
    assert people_count(number) == expected


@pytest.mark.parametrize(
    ("number", "expected"), [(0, "0 bytes"), (512, "512 bytes"), (7_300_000, "7.3 MB"), (13.5e9, "13.5 GB")]
)
def test_bytes(number, expected):
    assert people_bytes(number) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0s"),
        (-3, "0s"),
        (59.4, "59s"),
        (59.6, "1m"),
        (86_430, "1d"),
        (216, "3m36s"),
        (3_605, "1h"),
        (3_700, "1h1m"),
        (90_061, "1d1h"),
        (1e7, "115d17h"),
        (float("inf"), "?"),
    ],
)
def test_times(seconds, expected):
    assert people_time(seconds) == expected
