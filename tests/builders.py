"""Builders of runs and attempts for tables of cases."""

import copy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from headrace_api.errors import parse_run
from headrace_api.faults import FaultClass, Outcome
from headrace_api.run import RunStatus, TrainingRun
from headrace_operator.brain.observed import Attempt, AttemptState, Observed

START = datetime(2026, 1, 1, tzinfo=UTC)

STAGES: dict[str, dict[str, Any]] = {
    "corpus": {"corpus": {"sources": [{"uri": "/raw"}]}},
    "tok": {"tokenizer": {"from": {"corpus": "corpus"}, "vocabSize": 4096}},
    "tokens": {"shards": {"from": {"corpus": "corpus", "tokenizer": "tok"}}},
    "base": {
        "compute": {"ranksPerNode": 2},
        "pretrain": {
            "from": {"shards": "tokens"},
            "model": {"preset": "llama-nano"},
            "tokens": "1M",
            "sequenceLength": 128,
            "globalBatchSize": 16,
            "precision": "fp32",
            "parallelism": {"tensor": 2},
        },
    },
    "eval": {"evaluate": {"from": {"model": "base", "shards": "tokens"}}},
    "ship": {"export": {"from": {"model": "base"}}},
    "serve": {"deploy": {"from": {"model": "ship"}}},
}


def manifest(*stages: str, **spec: Any) -> dict[str, Any]:
    """A manifest with the named stages (all of them if none is named) and other fields of its spec."""
    names = stages or tuple(STAGES)
    return {
        "apiVersion": "headrace.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": "demo"},
        "spec": {
            "storage": {"uri": "/store"},
            **spec,
            "stages": [{"name": n, **copy.deepcopy(STAGES[n])} for n in names],
        },
    }


def make_run(*stages: str, status: RunStatus | None = None, **spec: Any) -> TrainingRun:
    """A valid run of ``manifest``."""
    return parse_run(manifest(*stages, **spec)).model_copy(update={"status": status or RunStatus()})


def seen(*attempts: Attempt, after_seconds: float = 0.0) -> Observed:
    """What a body sees, some time after START."""
    return Observed(now=START + timedelta(seconds=after_seconds), attempts=attempts)


def succeeded(digest: str | None = "d1", **metrics: float) -> Outcome:
    """The outcome of a stage that left an artifact."""
    return Outcome(artifact_digest=digest, metrics=metrics)


def failed(fault: FaultClass, *, reason: str = "Because", message: str = "said why") -> Outcome:
    """The outcome of a stage that did not."""
    return Outcome(fault=fault, reason=reason, message=message)


def ended(attempt: Attempt, outcome: Outcome) -> Attempt:
    """The attempt at its end."""
    state = AttemptState.SUCCEEDED if outcome.fault is None else AttemptState.FAILED
    return replace(attempt, state=state, outcome=outcome)
