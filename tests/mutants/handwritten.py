"""Mistakes written by hand, each with the tests that must notice it.

In: ``MUTANTS``. For each: a copy of the checkout with one text replaced, and the named tests run in it. They pass in an
unspoiled copy, and at least one of them fails in the spoiled one.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mutants.tree import REPO, copy_checkout, environment


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One mistake."""

    name: str
    file: str
    before: str
    """Text that stands exactly once in the file."""
    after: str
    tests: tuple[str, ...]
    """pytest's node ids."""


MUTANTS = (
    Mutant(
        name="the cosine is three quarters of a step late",
        file="trainer/headrace_trainer/engine/schedule.py",
        before="(step - schedule.warmup) / max",
        after="(step - 0.75 - schedule.warmup) / max",
        tests=("tests/trainer/engine/test_arithmetic.py",),
    ),
    Mutant(
        name="storage is written in place",
        file="trainer/headrace_trainer/storage.py",
        before='staged = final.with_name(f"{_STAGED}{uuid.uuid4().hex}")',
        after="staged = final",
        tests=(
            "tests/trainer/common/test_storage.py::test_a_process_that_is_killed_in_a_write_leaves_the_old_content",
        ),
    ),
    Mutant(
        name="the old artifact.json stays while it is replaced",
        file="trainer/headrace_trainer/artifacts.py",
        before='        store.delete(f"{stage}/{ARTIFACT_FILE}")  # from',
        after="        pass  # from",
        tests=(
            "tests/trainer/common/test_storage.py::test_a_process_that_is_killed_while_it_replaces_a_result_leaves_no_result",
        ),
    ),
    Mutant(
        name="gradients are not clipped",
        file="trainer/headrace_trainer/engine/optimizer.py",
        before="max_norm=optimizer.config.clip_grad",
        after="max_norm=1e9",
        tests=("tests/trainer/engine/test_optimizer.py",),
    ),
    Mutant(
        name="weights do not decay",
        file="trainer/headrace_trainer/engine/optimizer.py",
        before='weight_decay * group["wd_mult"]',
        after='0.0 * group["wd_mult"]',
        tests=("tests/trainer/engine/test_optimizer.py",),
    ),
    Mutant(
        name="start weights ignore the seed",
        file="trainer/headrace_trainer/engine/model/start.py",
        before='f"{seed} {key} {list(layer)}"',
        after='f"{key} {list(layer)}"',
        tests=("tests/trainer/engine/test_start.py",),
    ),
    Mutant(
        name="the residual stream is not scaled",
        file="trainer/headrace_trainer/engine/model/start.py",
        before="/ math.sqrt(2 * architecture.layers)",
        after="/ 1.0",
        tests=("tests/trainer/engine/test_start.py",),
    ),
    Mutant(
        name="the memory estimate is divided by ten",
        file="api/headrace_api/planning/cost.py",
        before="state_bytes_per_rank=memory.state,",
        after="state_bytes_per_rank=memory.state // 10,",
        tests=("tests/api/test_planning.py",),
    ),
    Mutant(
        name="a CEL rule is removed",
        file="charts/headrace/files/crd/trainingruns.headrace.dev.yaml",
        before="- message: minWords must be at most maxWords\n                            rule: self.minWords <= self.maxWords\n                          - message: minMean",
        after="- message: minMean",
        tests=("tests/operator/test_real_admission.py::test_a_rule_refuses_alone_what_it_is_there_to_refuse",),
    ),
    Mutant(
        name="a failed stage that is run again keeps its spent budget",
        file="operator/headrace_operator/brain/stage_plan.py",
        before="status = with_fresh_budgets(updated(status, state=StageState.PENDING))",
        after="status = updated(status, state=StageState.PENDING)",
        tests=("tests/plan/test_budgets.py",),
    ),
    Mutant(
        name="a status that lost a race is ignored",
        file="operator/headrace_operator/body/apply.py",
        before='            await self._look_again(raw)\n            raise Retry(f"the run changed during the reconcile: {error.message}") from error\n',
        after="            return\n",
        tests=("tests/operator/test_real_writes.py",),
    ),
    Mutant(
        name="stop does nothing",
        file="cli/headrace_cli/stop.py",
        before="        attempts.end_all(at_once=lambda: False)\n",
        after="",
        tests=("tests/local/test_stopping.py",),
    ),
    Mutant(
        name="nothing is killed after the grace period",
        file="trainer/headrace_trainer/agent/supervise.py",
        before="if not silent and since <= self.settings.grace_seconds:",
        after="if True:",
        tests=("tests/trainer/agent/test_stop.py",),
    ),
)


def run(names: list[str]) -> bool:
    """Try the mutants of these names, or all; print what became of each; whether all died."""
    chosen = [m for m in MUTANTS if not names or m.name in names]
    with tempfile.TemporaryDirectory(prefix="headrace-mutants-") as folder:
        tree = Path(folder)
        copy_checkout(tree)
        tests = sorted({test for mutant in chosen for test in mutant.tests})
        if tests and (code := _pytest(tree, tests)) != 0:
            print(f"the tests do not pass without a mutant: pytest ended with {code}")
            return False
        alive = [mutant.name for mutant in chosen if not _is_killed(tree, mutant)]
    print(
        f"handwritten mutants: {len(chosen) - len(alive)} of {len(chosen)} killed; alive: {', '.join(alive) or 'none'}"
    )
    return not alive


def spoil(tree: Path, mutant: Mutant) -> str:
    """Make the mistake; returns the file's text as it was.

    Raises:
        ValueError: the text to replace does not stand exactly once in the file.
    """
    path = tree / mutant.file
    text = path.read_text()
    if text.count(mutant.before) != 1:
        raise ValueError(f"{mutant.name}: {mutant.before!r} stands {text.count(mutant.before)} times in {mutant.file}")
    path.write_text(text.replace(mutant.before, mutant.after))
    return text


def _is_killed(tree: Path, mutant: Mutant) -> bool:
    began, text = time.monotonic(), spoil(tree, mutant)
    try:
        code = _pytest(tree, list(mutant.tests))
    finally:
        (tree / mutant.file).write_text(text)
    print(f"{'killed' if code == 1 else 'ALIVE':<7} {mutant.name} ({time.monotonic() - began:.0f} s)", flush=True)
    return code == 1


def _pytest(tree: Path, tests: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        print(done.stdout[-3000:], done.stderr[-1000:])
    return done.returncode


__all__ = ["MUTANTS", "REPO", "Mutant", "run", "spoil"]
