"""Handles late ranks: inspects them, saves the evidence, and identifies the one that hangs.

In: a ``Watch`` and the processes. Out: a ``stall`` outcome once it is certain. The agent then kills the ranks, and the
next attempt resumes from the checkpoint.
"""

import logging
import time
from collections.abc import Mapping, Sequence

from headrace_api.contract import ResolvedStage
from headrace_api.faults import FaultClass, Outcome
from headrace_api.stages import RunsAs
from headrace_trainer.agent import evidence
from headrace_trainer.agent.launch import Launch
from headrace_trainer.agent.settings import Settings
from headrace_trainer.agent.watch import LAUNCHER, Late, Look, Watch, suspect
from headrace_trainer.processes import cpu_seconds, is_stopped
from headrace_trainer.stage import EVIDENCE
from headrace_trainer.storage import open_store

_OTHER_POD_SECONDS = 15.0
"""If all of a pod's ranks wait for others, the pod with the hung rank gets this long to report it first."""
_IDLE_SHARE = 0.01
"""A silent task that uses less than this share of a core is doing nothing."""

log = logging.getLogger("headrace.agent")


class Stalls:
    """Handles the late ranks of one pod."""

    def __init__(self, resolved: ResolvedStage, settings: Settings, launch: Launch, watch: Watch) -> None:
        self._resolved, self._settings, self._launch, self._watch = resolved, settings, launch, watch
        self._cpu_seconds: dict[int, float] = {}
        self._found: Outcome | None = None
        self._found_at = 0.0

    def verdict(self) -> Outcome | None:
        """Why the ranks must be killed now; None until a hang is certain."""
        if not self._late():
            self._found = None
            return None
        if self._found is None:
            self._found, is_certain = self._look_into_it()
            self._found_at = time.monotonic()
            if is_certain and self._late():
                return self._found
        is_told_elsewhere = time.monotonic() - self._found_at < _OTHER_POD_SECONDS
        return None if is_told_elsewhere else self._found

    def _late(self) -> list[Late]:
        """Late ranks, except tasks that are silent but working."""
        late = self._watch.late()
        if self._resolved.stage.config.RUNS_AS is RunsAs.GANG:
            return late  # a rank that waits for its peers may be as busy as one that computes
        return [entry for entry in late if not self._works(entry)]

    def _works(self, late: Late) -> bool:
        """Whether a task has used the CPU since it was last late; if so, its timer restarts."""
        pid = self._launch.pids.get(late.rank, self._launch.launcher)
        spent = cpu_seconds(pid) - self._cpu_seconds.get(late.rank, 0.0)
        if is_stopped(pid) or spent < _IDLE_SHARE * late.seconds:
            return False
        self._cpu_seconds[late.rank] = self._cpu_seconds.get(late.rank, 0.0) + spent
        self._watch.excuse(late.rank)
        return True

    def _look_into_it(self) -> tuple[Outcome, bool]:
        """Save the evidence. Returns the outcome, and whether it is certain without waiting for other pods."""
        late = self._watch.late()
        pids = dict(self._launch.pids)
        if any(entry.rank == LAUNCHER for entry in late):
            pids[LAUNCHER] = self._launch.launcher
        scratch, first = self._settings.scratch, self._launch.plan.first
        stacks = evidence.read_stacks(pids, scratch, first=first)
        looks = self._looks(stacks)
        found = suspect([look for look in looks if look.rank in pids])
        is_certain = found is not None or self._resolved.stage.compute.nodes == 1
        files = self._files(pids, stacks)
        evidence.keep(files, scratch / EVIDENCE)
        where = evidence.upload(
            files, self._resolved, index=self._settings.index, open_store=lambda: open_store(self._resolved.storage)
        )
        return describe(late, found, evidence=where or str(scratch / EVIDENCE)), is_certain

    def _looks(self, stacks: Mapping[int, str]) -> list[Look]:
        return [
            Look(
                rank=entry.rank,
                phase=entry.phase,
                done=entry.done,
                seconds=entry.seconds,
                stopped=is_stopped(self._launch.pids.get(entry.rank, self._launch.launcher)),
                in_collective=evidence.waits_in_collective(stacks.get(entry.rank, "")),
            )
            for entry in self._watch.all()
        ]

    def _files(self, pids: Mapping[int, int], stacks: Mapping[int, str]) -> dict[str, bytes]:
        progress = {rank: slot.progress for rank, slot in self._launch.slots.items()}
        told = "\n".join(f"rank {rank}\n{text or 'could not be read'}" for rank, text in stacks.items())
        records = evidence.read_flight_records(self._settings.scratch, [r for r in pids if r != LAUNCHER])
        return {
            "stacks.txt": evidence.shorten(told),
            "heartbeats.json": evidence.shorten(evidence.heartbeats(self._watch.all(), pids, progress)),
            "processes.txt": evidence.shorten(evidence.describe_processes(pids)),
            **records,
        }


def describe(late: Sequence[Late], found: Look | None, *, evidence: str) -> Outcome:
    """The outcome of a stall.

    Args:
        late: the late ranks, longest first; not empty.
        found: the rank that the others wait for, if it could be identified.
        evidence: where the evidence is.
    """
    worst = next((entry for entry in late if found is not None and entry.rank == found.rank), late[0])
    ranks = sorted(entry.rank for entry in late)
    if found is not None or len(ranks) == 1:
        who = "the launcher hangs" if worst.rank == LAUNCHER else f"rank {worst.rank} hangs"
    else:
        who = f"ranks {', '.join(map(str, ranks))} hang, waiting for one another or for another pod"
    held = " (stopped by a signal or debugger)" if found is not None and found.stopped else ""
    message = (
        f"{who}{held}: phase {worst.phase}, {worst.done} {worst.unit} done, silent for {worst.seconds:.0f} s, "
        f"limit {worst.bound:.0f} s; evidence: {evidence}"
    )
    rank = worst.rank if worst.rank != LAUNCHER else None
    return Outcome(fault=FaultClass.STALL, reason="RankStalled", message=message, step=worst.done, rank=rank)
