"""mutmut over the pure rooms of ``api`` and ``operator``.

In: those rooms, laid out as one ``src`` folder in a copy, and the tests that need nothing but Python. Out: how many
mutants died, and each survivor that ``survivors.toml`` does not explain.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mutants.tree import copy_checkout, environment

LEAST_KILLED = 0.9
SURVIVORS = Path(__file__).with_name("survivors.toml")
_MUTATED = [
    "src/headrace_api/*",
    "src/headrace_operator/brain/*",
    "src/headrace_operator/body/build/*",
    "src/headrace_operator/body/records.py",
    "src/headrace_operator/body/outcomes.py",
]
_TESTS = [
    "tests/api",
    "tests/plan",
    "tests/operator/test_build.py",
    "tests/operator/test_golden.py",
    "tests/operator/test_merge.py",
    "tests/operator/test_cluster.py",
    "tests/operator/test_names.py",
    "tests/operator/test_records.py",
    "tests/operator/test_rules.py",
    # What only random tests would kill is killed by plainer ones too, and what they assert of time is not asked here.
    "--ignore=tests/api/test_fuzz.py",
    "--ignore=tests/plan/test_random.py",
    "--deselect=tests/api/test_manifest_files.py::test_the_largest_file_that_is_read_takes_no_longer_than_its_size",
]
_PYTEST = """
[tool.pytest.ini_options]
addopts = "--import-mode=importlib -p no:cacheprovider -p no:unraisableexception -p no:threadexception"
pythonpath = ["tests"]
"""
_DEAD = ("killed", "timeout", "segfault", "caught by type check")


@dataclass(frozen=True, kw_only=True)
class Survivor:
    """A mutant that no test noticed."""

    function: str
    """Dotted name, as headrace_operator.brain.plan.plan."""
    line: str
    """The first line that it changes, as changed; empty for a line that is gone."""


def run() -> bool:
    """Mutate, test, print; whether enough died and every survivor is explained."""
    with tempfile.TemporaryDirectory(prefix="headrace-mutants-") as folder:
        tree = Path(folder)
        _lay_out(tree)
        done = _python(tree, "-m", "mutmut", "run", "--max-children", "2")
        if done.returncode not in (0, 1) or not (tree / "mutants").is_dir():
            print(done.stdout[-4000:], done.stderr[-4000:])
            return False
        rows = json.loads(_python(tree, str(Path(__file__).with_name("diffs.py"))).stdout)
    survivors = [_survivor(name, diff) for name, state, diff in rows if state not in _DEAD]
    return _report(Counter(state for _, state, _ in rows), survivors)


def _lay_out(tree: Path) -> None:
    copy_checkout(tree)
    (tree / "src").mkdir()
    shutil.move(tree / "api" / "headrace_api", tree / "src" / "headrace_api")
    shutil.move(tree / "operator" / "headrace_operator", tree / "src" / "headrace_operator")
    settings: dict[str, object] = {
        "source_paths": ["src"],
        "only_mutate": _MUTATED,
        "also_copy": ["charts", "manifests"],
        "pytest_add_cli_args_test_selection": _TESTS,
        # Each mutant in a process that has imported the tests and run none: no cache is warm from the code as it was.
        "process_isolation": "forkserver",
        "timeout_constant": 5.0,
    }
    lines = [f"{key} = {value!r}" for key, value in settings.items()]
    (tree / "pyproject.toml").write_text("\n".join([_PYTEST, "[tool.mutmut]", *lines, ""]))


def _python(tree: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    env = environment(tree) | {"PYTHONPATH": "", "HEADRACE_TEST_SEED": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=tree, env=env, capture_output=True, text=True, check=False)


def _survivor(name: str, diff: str) -> Survivor:
    changed = [line[1:].strip() for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    return Survivor(
        function=re.sub(r"\.x_|\.xǁ|ǁ", ".", name.partition("__mutmut_")[0]), line=changed[0] if changed else ""
    )


def _report(states: "Counter[str]", survivors: list[Survivor]) -> bool:
    total, dead = states.total(), sum(states[state] for state in _DEAD)
    explained = tomllib.loads(SURVIVORS.read_text())["survivor"]
    unexplained = [s for s in survivors if not any(_explains(entry, s) for entry in explained)]
    stale = [entry for entry in explained if not any(_explains(entry, s) for s in survivors)]
    for survivor in unexplained:
        print(f"survived: {survivor.function}: {survivor.line}")
    for entry in stale:
        print(f"no longer survives, take it out of {SURVIVORS.name}: {entry['function']}: {entry['line']}")
    print(f"pure mutants: {dict(states)}")
    print(f"pure mutants: {dead} of {total} killed ({dead / total:.1%}); {len(survivors)} survive, {len(unexplained)} of "
          "them unexplained")  # fmt: skip
    return dead >= LEAST_KILLED * total and not unexplained and not stale


def _explains(entry: dict[str, str], survivor: Survivor) -> bool:
    """Whether an entry's two patterns match a survivor."""
    return bool(re.fullmatch(entry["function"], survivor.function) and re.search(entry["line"], survivor.line))
