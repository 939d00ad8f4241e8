"""Which of a pod's ranks explains how the attempt ended. Pure."""

import signal
from collections.abc import Sequence

from headrace_api.faults import ExitCode, FaultClass, Outcome, most_telling
from headrace_trainer.agent.launch import Ended

_CODES = {
    None: ExitCode.OK,
    FaultClass.USER: ExitCode.USER,
    FaultClass.STORAGE: ExitCode.STORAGE,
    FaultClass.STOPPED: ExitCode.STOPPED,
}


def exit_code_of(outcome: Outcome) -> int:
    """The pod's exit code."""
    return _CODES.get(outcome.fault, ExitCode.PROCESS)


def explain(
    words: Sequence[Outcome], ended: Sequence[Ended], *, verdict: Outcome | None = None, oom_kills: int | None = None
) -> Outcome:
    """The outcome of a pod.

    Args:
        words: what its ranks said at their ends, the earliest first.
        ended: how they ended of themselves, the first one first.
        verdict: why the agent killed the rest; None if it had no reason of its own.
        oom_kills: processes that the kernel killed meanwhile for want of memory; None where that is not known.
    """
    if verdict is None and ended and all(e.code == 0 for e in ended):
        return next((o for o in words if o.artifact_digest is not None), Outcome())
    told = most_telling(words)
    if told is not None and told.fault is not FaultClass.PROCESS:
        return told
    # A rank that a signal ended could not speak, and its peers' errors follow from that.
    killed = next((_killed(e, oom_kills=oom_kills) for e in ended if e.code < 0), None)
    return verdict or killed or told or _silent(ended)


def _killed(ended: Ended, *, oom_kills: int | None) -> Outcome:
    name = signal.Signals(-ended.code).name
    who = "the launcher of the ranks" if ended.rank is None else f"rank {ended.rank}"
    reason, message = "RankKilled", f"{who} was ended by {name}"
    if name == "SIGKILL" and oom_kills:
        reason = "OutOfMemory"
        message = f"{who} ran out of memory, and the kernel killed it: raise compute.memory, or lower microBatchSize"
    elif name == "SIGKILL" and oom_kills is None:
        message += "; if nobody did that, it may have run out of memory"
    return Outcome(fault=FaultClass.PROCESS, reason=reason, message=message, rank=ended.rank)


def _silent(ended: Sequence[Ended]) -> Outcome:
    first = next((e for e in ended if e.code != 0), None)
    who = "the launcher" if first is None or first.rank is None else f"rank {first.rank}"
    code = first.code if first is not None else "unknown"
    message = f"{who} ended with exit code {code} without a word; see the log"
    return Outcome(fault=FaultClass.PROCESS, reason="RanksFailed", message=message, rank=first.rank if first else None)
