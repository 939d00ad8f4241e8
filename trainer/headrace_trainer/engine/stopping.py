"""When a stage ends before its last epoch: decided from the history alone, so that a run that was killed decides the same.

In: the records of a ``History``. Out: why the stage ends, if it does.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from headrace_api.stages.finetune import EarlyStop


def reason_to_stop(records: Sequence[Mapping[str, Any]], early_stop: EarlyStop | None) -> str | None:
    """Why training ends after the newest record; None where it goes on.

    Args:
        records: of every step so far.
        early_stop: the stage's; None never ends it.
    """
    if early_stop is None or not records or "validation_loss" not in records[-1]:
        return None
    lowest, at, since = math.inf, 0, 0
    for record in records:
        if (loss := record.get("validation_loss")) is None:
            continue
        if loss < lowest - early_stop.min_delta:
            lowest, at, since = loss, record["step"], 0
        else:
            since += 1
    if since < early_stop.patience:
        return None
    return (
        f"stopped early after step {records[-1]['step']}: {since} measurements in a row did not bring the held-out loss "
        f"below {lowest:.4f}, that of step {at}, by more than {early_stop.min_delta:g}"
    )
