"""Which training goes on: that of the checkpoints in storage, or one from step 0. Pure.

In: what a run is (``resume_identity``) and what trainings left checkpoints beside it. Out: the folder to use, and why
training begins at step 0 although there are checkpoints; or why it may not begin.

Trainings of another identity have folders of their own, so that one can be gone back to.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace_api.artifact import canonical_digest
from headrace_api.stages.training import OnMismatch
from headrace_trainer.engine.checkpoint.manifest import CheckpointManifest

_DIGEST = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True, kw_only=True)
class Training:
    """A folder of checkpoints."""

    folder: str
    newest: CheckpointManifest
    """Of the newest checkpoint that can be read."""

    @property
    def is_finished(self) -> bool:
        """Whether it came to its last step, so that nothing is lost if it does not go on."""
        return self.newest.step >= self.newest.steps


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to do."""

    folder: str
    """Where this run's checkpoints are, or will be."""
    message: str = ""
    """Why training begins at step 0, where there are checkpoints."""
    refusal: str = ""
    """Why it may not begin, with the remedy; empty where it may."""


def choose(
    identity: Mapping[str, Any], trainings: Sequence[Training], *, steps: int, on_mismatch: OnMismatch
) -> Choice:
    """Decide.

    Args:
        identity: this run's ``resume_identity``.
        trainings: what lies in the stage's folder.
        steps: this run's last step.
        on_mismatch: whether unfinished work that does not fit may be left behind.
    """
    home = canonical_digest(identity)[:12]
    mine = sorted((t for t in trainings if t.newest.identity == identity), key=lambda t: _number(t.folder))
    if mine and mine[-1].newest.step <= steps:
        return Choice(folder=mine[-1].folder)
    if mine:
        fresh, left = f"{home}-{len(mine) + 1}", [mine[-1]]
    else:
        fresh, left = home, sorted(trainings, key=lambda t: t.newest.created_at)
    unfinished = [t for t in left if not t.is_finished]
    if unfinished and on_mismatch is OnMismatch.REFUSE:
        return Choice(folder=fresh, refusal=_refusal(unfinished[-1], identity, steps=steps))
    if left:
        return Choice(folder=fresh, message=f"began at step 0: {_difference(left[-1], identity, steps=steps)}")
    return Choice(folder=fresh)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What two identities disagree on, a field each: ``schedule.learningRate: 0.001 there, 0.003 here``."""
    theirs, ours = dict(_flat(there)), dict(_flat(here))
    return [
        f"{field}: {_shown(theirs.get(field))} there, {_shown(ours.get(field))} here"
        for field in sorted(theirs.keys() | ours.keys())
        if theirs.get(field) != ours.get(field)
    ]


def _refusal(training: Training, identity: Mapping[str, Any], *, steps: int) -> str:
    kind = identity["kind"]
    return (
        f"unfinished work would be left behind: {_difference(training, identity, steps=steps)}. Set these back to go on from it; or set "
        f"{kind}.checkpoint.onMismatch to restart to begin at step 0 beside it, or another storage.uri"
    )


def _difference(training: Training, identity: Mapping[str, Any], *, steps: int) -> str:
    newest = training.newest
    if newest.identity == identity:
        found = f"tokens: this run ends at step {steps}, before it"
    else:
        found = "; ".join(differences(newest.identity, identity))
    return (
        f"the checkpoint of step {newest.step} of {newest.steps} in checkpoints/{training.folder} does not fit: {found}"
    )


def _flat(value: Mapping[str, Any], *, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        # Fields of the typed block are named as in the manifest, without a word before them.
        name = path if not path and key == "config" else f"{path}{key}"
        if isinstance(item, Mapping):
            yield from _flat(item, path=f"{name}." if name else "")
        else:
            yield name, item


def _shown(value: object) -> str:
    return value[:12] if isinstance(value, str) and _DIGEST.match(value) else "none" if value is None else str(value)


def _number(folder: str) -> int:
    """1 for the first folder of an identity, then what stands behind the dash."""
    return int(folder.partition("-")[2] or 1)
