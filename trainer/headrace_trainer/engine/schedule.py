"""The learning rate and the moments of the run that come back every so often: pure functions of the step."""

import math

from headrace_api.base import Cadence, parse_duration
from headrace_api.stages.training import Decay, Schedule


def learning_rate(schedule: Schedule, *, step: int, steps: int) -> float:
    """The rate of a step.

    Args:
        schedule: peak, floor, warm-up and curve.
        step: the step, counted from 1.
        steps: steps in the whole run; the cosine (arXiv 1608.03983, eq. 5) ends there.
    """
    peak, floor = schedule.learning_rate, schedule.final_rate
    if step <= schedule.warmup:
        return peak * step / schedule.warmup
    if schedule.decay is Decay.CONSTANT:
        return peak
    progress = (step - schedule.warmup) / max(1, steps - schedule.warmup)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def is_due(every: Cadence, *, step: int, seconds: float) -> bool:
    """Whether a save is due after ``step``, ``seconds`` after the one before."""
    if isinstance(every, int):
        return step % every == 0
    return seconds >= parse_duration(every)
