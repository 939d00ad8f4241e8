"""The complete objects of an attempt, compared with golden/: the contract with the cluster, to be reviewed on change.

HEADRACE_WRITE_GOLDEN=1 writes the files anew. ``test_real_objects`` shows them to an API server.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace_api.contract import ResolvedStage
from headrace_api.runtime import TrainingRuntime
from headrace_operator.body.build import build, owned

Json = dict[str, Any]

GOLDEN = Path(__file__).with_name("golden")
SOURCES = sorted(GOLDEN.glob("*.in.yaml"))
UID = "00000000-0000-0000-0000-000000000002"


def objects_of(source: Path) -> list[Json]:
    """Everything that the operator writes for the attempt, in order; the stage itself, which has its own tests, cut out."""
    given = yaml.safe_load(source.read_text())
    built = build(ResolvedStage.model_validate(given["stage"]), TrainingRuntime.model_validate(given["runtime"]))
    stored = {**built.workload, "metadata": {**built.workload["metadata"], "uid": UID}}
    service, config = (owned(dependent, by=stored) for dependent in built.dependents)
    objects = [built.account, built.workload, service, {**config, "data": dict.fromkeys(config["data"], "{}")}]
    return objects if built.scale is None else [*objects, built.scale]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name.removesuffix(".in.yaml"))
def test_an_attempt_is_built_as_it_is_written_down(source: Path) -> None:
    golden, objects = source.with_name(source.name.replace(".in.", ".")), objects_of(source)
    if os.environ.get("HEADRACE_WRITE_GOLDEN"):
        plain = yaml.SafeDumper
        plain.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]
        golden.write_text(yaml.dump_all(objects, Dumper=plain, sort_keys=False, width=120))
    assert objects == list(yaml.safe_load_all(golden.read_text()))
