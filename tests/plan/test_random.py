"""Random events in random order: the planner never spins, never runs a gang twice, and never charges twice."""

import os
import random
from dataclasses import replace
from datetime import timedelta

import pytest

from builders import START, ended, failed, succeeded
from headrace_api.faults import FaultClass, Outcome
from headrace_api.run import RunStatus, StageState
from headrace_operator.brain.observed import LIVE, AttemptState, Held, Observed, Refusal
from headrace_operator.brain.plan import plan
from plan.body import Body, body

STAGES = ("corpus", "tok", "tokens", "base", "ship", "serve")
SEED = int(os.environ.get("HEADRACE_TEST_SEED", random.randrange(10**6)))


class Weather:
    """Does random things to a run."""

    def __init__(self, it: Body, draw: random.Random) -> None:
        self.it, self.draw = it, draw

    def act(self) -> None:
        """One thing happens, or some time passes."""
        acts = {
            self._end: 4,
            self._report: 4,
            self._change: 2,
            self._vanish: 1,
            self._refuse: 1,
            self._edit: 2,
            self._suspend: 1,
        }
        self.draw.choices(list(acts), weights=list(acts.values()))[0]()
        self.it.seconds += self.draw.choice([0, 0, 1, 5, 31, 61, 700, 86_400])

    def _pick(self) -> tuple[str, int] | None:
        """Mostly the newest attempt."""
        keys = list(self.it.attempts)
        return (keys[-1] if self.draw.random() < 0.8 else self.draw.choice(keys)) if keys else None

    def _end(self) -> None:
        if (key := self._pick()) is None:
            return
        fault = self.draw.choice([*([None] * 10), *FaultClass])
        outcome = failed(fault) if fault else succeeded(self.draw.choice(["d", "d", "d", None]))
        attempt = self.it.attempts[key]
        self.it.attempts[key] = replace(ended(attempt, outcome), outcome=self.draw.choice([outcome, outcome, None]))

    def _report(self) -> None:
        if (key := self._pick()) is None or self.it.attempts[key].state not in LIVE:
            return
        phase = self.draw.choice(["Starting", "Running", "Saving"])
        endpoint = "http://here" if key[0] == "serve" and self.draw.random() < 0.7 else None
        done = self.draw.choice([0, 50, 120, 10**4])
        self.it.tell(key, phase=phase, endpoint=endpoint, done=done)

    def _change(self) -> None:
        if (key := self._pick()) is None:
            return
        since = self.draw.choice([None, START + timedelta(seconds=self.it.seconds)])
        held = self.draw.choice([None, Held(reason="Held", message="m", since=since)])
        state = self.draw.choice(list(AttemptState))
        uid = self.draw.choice([self.it.attempts[key].uid] * 5 + ["another"])
        self.it.attempts[key] = replace(self.it.attempts[key], state=state, held=held, uid=uid)

    def _vanish(self) -> None:
        if (key := self._pick()) is not None:
            del self.it.attempts[key]

    def _refuse(self) -> None:
        wanted = self.it.last.start if self.it.last is not None else ()
        outcome = Outcome(fault=self.draw.choice([FaultClass.CAPACITY, FaultClass.POD]), reason="Refused")
        refusals = tuple(Refusal(stage=r.stage.name, number=r.attempt, outcome=outcome) for r in wanted)
        self.it.refusals = self.draw.choice([(), refusals])

    def _edit(self) -> None:
        stages = self.it.run.spec.dump()["stages"]
        base, serve = stages[-3], stages[-1]
        if self.draw.random() < 0.5:
            base["compute"] = {"ranksPerNode": 2, "memory": self.draw.choice(["1Gi", "2Gi"])}
        else:
            serve["deploy"]["port"] = self.draw.choice([8000, 9000])
        self._ask(stages=stages)
        if self.draw.random() < 0.1:
            self._ask(seed=self.draw.choice([1, 2]))

    def _suspend(self) -> None:
        self._ask(suspend=not self.it.run.spec.suspend)

    def _ask(self, **spec: object) -> None:
        self.it.change(**spec)
        self.it.generation((self.it.run.metadata.generation or 0) + 1)


def check(it: Body, before: RunStatus) -> None:
    """What must hold of every plan."""
    decided, now = it.last, START + timedelta(seconds=it.seconds)
    assert decided is not None
    assert decided.requeue_after_seconds is None or decided.requeue_after_seconds >= 1, "it spins"
    spent = {"infra_spent": it.run.spec.restart_policy.max_infra_restarts, "user_spent": 0}
    for old, new in zip(before.stages, it.run.status.stages, strict=False):
        assert new.attempt >= old.attempt and new.settled <= new.attempt, "numbers run backwards"
        restarts = new.infra_restarts + new.user_restarts - old.infra_restarts - old.user_restarts
        assert restarts in (0, 1) and (not restarts or old.attempt > old.settled or new.settled > old.settled)
        assert all(getattr(new, field) <= most for field, most in spent.items()), "more than the budget is spent"
        if new.state in (StageState.RUNNING, StageState.STARTING):
            assert new.attempt > new.settled, "an attempt that is not followed is said to run"
    seen = Observed(now=now, attempts=tuple(it.attempts.values()), refusals=it.refusals)
    again = plan(it.run, seen)
    once_more = plan(it.run.model_copy(update={"status": again.status}), seen)
    assert once_more.status == again.status, "planning again changes something"
    assert once_more.events == ()


@pytest.mark.parametrize("seed", range(SEED, SEED + 20))
def test_the_planner_in_random_weather(seed: int) -> None:
    print(f"set HEADRACE_TEST_SEED={seed} to begin with this one")
    draw = random.Random(seed)
    it = body(*STAGES, restartPolicy={"maxInfraRestarts": 4})
    it.generation(1)
    for _ in range(draw.randrange(len(STAGES))):
        it.end(succeeded("d"))
    weather = Weather(it, draw)
    for _ in range(100):
        before = it.run.status
        weather.act()
        live = {key for key, attempt in it.attempts.items() if attempt.state in LIVE}
        it.step()
        for r in it.last.start:
            others = {key for key in live if key[0] == r.stage.name and key[1] != r.attempt}
            assert r.stage.name == "serve" or not others, f"{r.attempt} would run beside {others}"
        check(it, before)
