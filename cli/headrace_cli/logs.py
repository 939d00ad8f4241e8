"""The logs of a run's agents, with follow mode."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headrace_api.run import ConditionType, StageState
from headrace_cli.attempts import LocalAttempts
from headrace_cli.home import RunFolder
from headrace_cli.live import Seen, look

_POLL_SECONDS = 0.3
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A chunk of one log."""

    path: Path
    content: bytes

    @property
    def title(self) -> str:
        """Attempt and agent, such as ``base-2 agent-0``."""
        return f"{self.path.parent.name} {self.path.stem}"


def read_logs(folder: RunFolder, *, stage: str | None, follow: bool) -> Iterator[Piece]:
    """The logs of each stage's newest attempt, in order; with ``follow``, also everything written until the run ends.

    Stages and attempts that start meanwhile are followed too.

    Args:
        folder: the run.
        stage: limits it to this stage.
        follow: whether to keep reading.
    """
    read: dict[Path, int] = {}
    while True:
        # Check first: whatever was written before the end must still be read.
        ended = not follow or _has_ended(look(folder), stage=stage)
        for path in _newest(folder, stage=stage):
            yield from _unread(path, read)
        if ended:
            return
        time.sleep(_POLL_SECONDS)


def _newest(folder: RunFolder, *, stage: str | None) -> list[Path]:
    attempts, known = LocalAttempts(folder=folder.attempts), folder.outline().kinds
    names = [stage] if stage is not None else [*known, *sorted(attempts.stages() - set(known))]
    return [path for name in names for path in attempts.log_files(name)]


def _has_ended(seen: Seen, *, stage: str | None) -> bool:
    """Whether nothing more will be written. For a whole run, a server that stays up does not count."""
    lives = {a.stage for a in seen.live}
    if stage is not None:
        state = next((s.state for s in seen.status.stages if s.name == stage), None)
        return stage not in lives and (not seen.attended or state in (StageState.SUCCEEDED, StageState.FAILED))
    at_rest = any(seen.status.condition(kind) for kind in ConditionType)
    return not seen.attended and (at_rest or not lives)


def _unread(path: Path, read: dict[Path, int]) -> Iterator[Piece]:
    try:
        with path.open("rb") as log:
            log.seek(read.get(path, 0))
            while piece := log.read(_PIECE_BYTES):
                read[path] = log.tell()
                yield Piece(path=path, content=piece)
    except FileNotFoundError:
        return  # the folder of an old attempt is removed once newer ones have ended
