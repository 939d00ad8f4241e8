"""Which rank's outcome explains how the pod ended. Pure."""

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
    """The pod's exit code for an outcome."""
    return _CODES.get(outcome.fault, ExitCode.PROCESS)


def explain(
    words: Sequence[Outcome], ended: Sequence[Ended], *, verdict: Outcome | None = None, oom_kills: int | None = None
) -> Outcome:
    """The outcome of a pod.

    Args:
        words: the ranks' own outcomes, earliest first.
        ended: the ranks that ended on their own, in order.
        verdict: why the agent killed the rest, or None.
        oom_kills: OOM kills in the meantime; None if unknown.
    """
    if verdict is None and ended and all(e.code == 0 for e in ended):
        return next((o for o in words if o.artifact_digest is not None), Outcome())
    told = most_telling(words)
    if told is not None and told.fault is not FaultClass.PROCESS:
        return told
    # A rank killed by a signal leaves no outcome, and its peers' errors follow from its death.
    killed = next((_killed(e, oom_kills=oom_kills) for e in ended if e.code < 0), None)
    return verdict or killed or told or _silent(ended)


def _killed(ended: Ended, *, oom_kills: int | None) -> Outcome:
    name = signal.Signals(-ended.code).name
    who = "the launcher" if ended.rank is None else f"rank {ended.rank}"
    reason, message = "RankKilled", f"{who} was killed by {name}"
    if name == "SIGKILL" and oom_kills:
        reason = "OutOfMemory"
        message = f"{who} ran out of memory and was killed by the kernel: raise compute.memory, or lower microBatchSize"
    elif name == "SIGKILL" and oom_kills is None:
        message += "; if nobody did that, it may have run out of memory"
    return Outcome(fault=FaultClass.PROCESS, reason=reason, message=message, rank=ended.rank)


def _silent(ended: Sequence[Ended]) -> Outcome:
    first = next((e for e in ended if e.code != 0), None)
    who = "the launcher" if first is None or first.rank is None else f"rank {first.rank}"
    code = first.code if first is not None else "unknown"
    message = f"{who} exited with code {code} and left no outcome; see the log"
    return Outcome(fault=FaultClass.PROCESS, reason="RanksFailed", message=message, rank=first.rank if first else None)
