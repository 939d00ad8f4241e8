"""What is done about a step whose loss or gradient is not a finite number: decided from the history alone. Pure.

The step's update is left out; too many of those, and the weights of an older checkpoint are taken, with the data that was
read since left out; too many again, and people must decide. As only the history counts, a run that was killed in between
decides the same when it comes back.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from itertools import takewhile
from typing import Any

from headrace_api.stages.training import NonFinite

WINDOW = 1000
"""Steps that are looked back on."""


class Verdict(Enum):
    """What follows a step that was skipped."""

    GO_ON = "go on"
    ROLL_BACK = "roll back"
    GIVE_UP = "give up"


def judge(records: Sequence[Mapping[str, Any]], budget: NonFinite) -> Verdict:
    """Decide.

    Args:
        records: the history, a step each.
        budget: how many steps may be skipped.
    """
    window = records[-WINDOW:]
    since = [*takewhile(lambda r: "rolled_back" not in r, reversed(window))]
    in_a_row = sum(1 for _ in takewhile(lambda r: "skipped" in r, since))
    skipped = sum("skipped" in r for r in since)
    if in_a_row <= budget.max_in_a_row and skipped <= budget.max_per_1000_steps:
        return Verdict.GO_ON
    return Verdict.ROLL_BACK if len(since) == len(window) else Verdict.GIVE_UP


def last_update(records: Sequence[Mapping[str, Any]]) -> int:
    """The newest step that changed the weights as they are now; 0 for none."""
    updates = (r["step"] for r in reversed(records) if "skipped" not in r and "rolled_back" not in r)
    return next(updates, 0)
