"""A body without processes, for tables of cases: attempts are values, and time passes on demand."""

from dataclasses import dataclass, field, replace
from datetime import timedelta

from builders import START, ended, make_run
from headrace_api.contract import Progress
from headrace_api.faults import Outcome
from headrace_api.run import RunStatus, StageState, StageStatus, TrainingRun
from headrace_operator.brain.observed import Attempt, AttemptState, Observed, Refusal
from headrace_operator.brain.plan import Plan, plan


@dataclass
class Body:
    """Carries plans out in one dictionary; keeps the status as the JSON that a real body keeps."""

    run: TrainingRun
    attempts: dict[tuple[str, int], Attempt] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()
    seconds: float = 0.0
    made: int = 0
    """How many attempts were made; each has a uid of its own."""
    last: Plan | None = None

    def step(self, *, after_seconds: float = 0.0) -> Plan:
        """Plan once, some time later, and carry it out."""
        self.seconds += after_seconds
        now = START + timedelta(seconds=self.seconds)
        observed = Observed(now=now, attempts=tuple(self.attempts.values()), refusals=self.refusals)
        decided = plan(self.run, observed)
        status = RunStatus.model_validate(decided.status.dump())
        assert status == decided.status, "it says the same to whoever reads it back"
        self.run = self.run.model_copy(update={"status": status})
        for key in decided.stop:
            old = self.attempts[key.stage, key.number]
            if old.state in (AttemptState.PENDING, AttemptState.RUNNING, AttemptState.STOPPING):
                self.attempts[key.stage, key.number] = replace(old, state=AttemptState.STOPPING)
            else:
                del self.attempts[key.stage, key.number]
        refused = {(r.stage, r.number) for r in self.refusals}
        for r in decided.start:
            key = (r.stage.name, r.attempt)
            if key not in refused and key not in self.attempts:
                self.made += 1
                self.attempts[key] = Attempt(
                    stage=key[0],
                    number=key[1],
                    uid=f"uid-{self.made}",
                    hash=r.hash,
                    digest=r.digest,
                    state=AttemptState.RUNNING,
                )
        self.last = decided
        return decided

    def end(self, outcome: Outcome, *, after_seconds: float = 0.0) -> Plan:
        """The attempt that is under way ends so; plan again."""
        key = self.under_way()
        self.attempts[key] = ended(self.attempts[key], outcome)
        return self.step(after_seconds=after_seconds)

    def report(self, **fields: object) -> Plan:
        """The attempt that is under way reports progress; plan again."""
        stage, number = self.under_way()
        progress = Progress.model_validate({"stage": stage, "attempt": number, "time": START, **fields})
        return self.see(progress=progress)

    def tell(self, key: tuple[str, int], **fields: object) -> None:
        """An attempt reports progress."""
        progress = Progress.model_validate({"stage": key[0], "attempt": key[1], "time": START, **fields})
        self.attempts[key] = replace(self.attempts[key], progress=progress)

    def see(self, **fields: object) -> Plan:
        """The attempt that is under way looks different; plan again."""
        key = self.under_way()
        self.attempts[key] = replace(self.attempts[key], **fields)
        return self.step()

    def refuse(self, outcome: Outcome, *, in_part: bool = False) -> Plan:
        """The start of the newest attempt is refused, or that of some of its objects; plan again."""
        assert self.last is not None
        (wanted,) = self.last.start
        if not in_part:
            self.attempts.pop((wanted.stage.name, wanted.attempt), None)
        self.refusals = (Refusal(stage=wanted.stage.name, number=wanted.attempt, outcome=outcome),)
        return self.step()

    def under_way(self) -> tuple[str, int]:
        """The newest attempt that has not said how it ended."""
        return next(key for key, attempt in reversed(self.attempts.items()) if attempt.outcome is None)

    def change(self, **spec: object) -> None:
        """The user edits the spec."""
        value = self.run.spec.dump() | spec
        self.run = self.run.model_copy(update={"spec": type(self.run.spec).model_validate(value)})

    def generation(self, number: int) -> None:
        """The API server counts an edit."""
        metadata = self.run.metadata.model_copy(update={"generation": number})
        self.run = self.run.model_copy(update={"metadata": metadata})

    def started(self) -> list[tuple[str, int]]:
        """What the last plan would have exist."""
        assert self.last is not None
        return [(r.stage.name, r.attempt) for r in self.last.start]

    def stopped(self) -> list[tuple[str, int]]:
        """What the last plan would end."""
        assert self.last is not None
        return [(k.stage, k.number) for k in self.last.stop]

    def status(self, stage: str) -> StageStatus:
        """A stage's status."""
        return next(s for s in self.run.status.stages if s.name == stage)

    def state(self, stage: str) -> StageState:
        """Where a stage is."""
        return self.status(stage).state


def body(*stages: str, **spec: object) -> Body:
    """A run that was planned once."""
    made = Body(run=make_run(*stages, **spec))
    made.step()
    return made
