"""The GPU benchmark, rehearsed without a GPU: sections that can run do, the others report what they lack."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.processes import FreshProcesses, PieceFailed
from benchmarks.gpu.report import markdown
from benchmarks.gpu.sections import sections
from benchmarks.gpu.wheels import pinned, split
from benchmarks.training import Training
from headrace_api.model import PRESETS

ROOT = Path(__file__).parents[2]


def benchmark(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--smoke", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu")
    done = benchmark(out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def results(out: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((out / "results.json").read_text())["sections"]
    return found


@pytest.mark.slow
def test_every_section_runs_or_lacks_a_gpu(rehearsed: Path) -> None:
    found = results(rehearsed)
    assert list(found) == [section.name for section in sections()]
    assert {name for name, entry in found.items() if entry["status"] != "done"} == {
        name for name in found if "fp8" in name
    }
    assert {entry["reason"] for entry in found.values() if entry["status"] == "unmet"} == {"no GPU"}
    assert found["resume-bf16"]["result"]["identical"] is True
    assert found["save"]["result"]["bytes"] > 0
    text = (rehearsed / "results.md").read_text()
    assert "| 8b-bf16 | local |" in text
    assert "| curve-fp8-delayed | unmet | no GPU |" in text


@pytest.mark.slow
def test_what_is_done_is_not_done_again(rehearsed: Path) -> None:
    before = results(rehearsed)
    done = benchmark(rehearsed, "--only", "curve-bf16", "--only", "peak")
    assert done.returncode == 0, done.stderr
    assert "curve-bf16 ..." not in done.stdout
    assert results(rehearsed) == before


def test_a_section_that_failed_is_named_and_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import __main__ as driver

    def fail(*_args: Any) -> None:
        raise PieceFailed("time_steps: CUDA out of memory")

    monkeypatch.setattr(driver, "FreshProcesses", lambda **_: fail)
    assert driver.main(["--device", "cpu", "--smoke", "--out", str(tmp_path), "--only", "step-8b-bf16"]) == 1
    assert results(tmp_path)["step-8b-bf16"]["status"] == "failed"
    assert "| step-8b-bf16 | failed | time_steps: CUDA out of memory |" in (tmp_path / "results.md").read_text()


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def die() -> None:
    os._exit(7)


def complain() -> None:
    raise ValueError("no such shape")


@pytest.mark.parametrize(
    ("piece", "args", "said"),
    [(sleep, (600.0,), "not done in time"), (die, (), "exit code 7"), (complain, (), "ValueError: no such shape")],
)
def test_a_piece_that_does_not_return_is_an_error_in_time(piece: Any, args: tuple[Any, ...], said: str) -> None:
    fresh = FreshProcesses(on_gpu=True)
    fresh.deadline = time.monotonic() + (5 if piece is sleep else 600)
    with pytest.raises(PieceFailed, match=said):
        fresh(piece, *args)


def step(tokens_per_second: float, tflops: float) -> dict[str, Any]:
    return {
        "status": "done",
        "result": {
            "kernels": "Transformer Engine",
            "milliseconds": 500.0,
            "tokens_per_second": tokens_per_second,
            "tflops": tflops,
            "peak_gib": 60.0,
            "planned_state_gib": 41.5,
        },
    }


def test_the_report_says_what_fp8_gains_and_how_far_its_losses_are() -> None:
    text = markdown(
        {
            "peak": {"status": "done", "result": {"size": 8192, "tflops": 790.0}},
            "step-8b-bf16": step(10_000, 395.0),
            "step-8b-fp8-tensorwise": step(14_000, 553.0),
            "curve-bf16": {"status": "done", "result": [5.0, 4.0, 3.0]},
            "curve-fp8-tensorwise": {"status": "done", "result": [5.0, 4.25, 2.875]},
        },
        title="x",
    )
    assert "| 8b-bf16 | Transformer Engine | 500.0 | 10,000 | 50.0% | 39.9% |  | 1.00 | 60.0 (41.5) |" in text
    assert "| 8b-fp8-tensorwise | Transformer Engine | 500.0 | 14,000 | 70.0% | 55.9% | 27.9% | 1.40 |" in text
    assert "| fp8-tensorwise | 5.0000 | 2.8750 | 0.2500 | -0.1250 |" in text


def test_operations_are_counted_for_weights_that_multiply_and_for_half_of_attention() -> None:
    training = Training(
        architecture=PRESETS["llama-1b"], vocab_size=32_000, length=4096, global_batch=1, micro_batch=1, steps=10
    )
    matrices = 16 * (2048 * 2048 * 2 + 2048 * 512 * 2 + 3 * 2048 * 8192) + 32_000 * 2048
    norms = 33 * 2048
    assert training.flops_per_token == 6 * (matrices + norms) + 6 * 16 * 2048 * 4096


def test_wheels_are_cut_and_dealt_out_and_come_together_again(tmp_path: Path) -> None:
    wheels, parts = tmp_path / "wheels", tmp_path / "build" / "gpu"
    wheels.mkdir()
    large, small = os.urandom(2500), os.urandom(300)
    (wheels / "large-1.whl").write_bytes(large)
    (wheels / "small-1.whl").write_bytes(small)
    made = split(wheels, parts, part_bytes=1000)
    assert all(sum(p.stat().st_size for p in part.iterdir()) <= 1000 for part in made)
    env = {**os.environ, "HEADRACE_GPU_HOME": str(tmp_path / "home")}
    script = ROOT / "benchmarks" / "gpu" / "install.sh"
    for command in ("take", "join"):
        subprocess.run(["sh", str(script), command], cwd=tmp_path, env=env, check=True, capture_output=True)
    found = {p.name: p.read_bytes() for p in (tmp_path / "home" / "wheels").iterdir()}
    assert found == {"large-1.whl": large, "small-1.whl": small}


def test_requirements_keep_their_hashes() -> None:
    text = "a==1 \\\n    --hash=sha256:00 \\\n    --hash=sha256:11\n    # via b\nb==2 ; x == 'y' \\\n    --hash=sha256:22\n"
    assert pinned(text, ["b", "a"]) == (
        "b==2 ; x == 'y' \\\n    --hash=sha256:22\na==1 \\\n    --hash=sha256:00 \\\n    --hash=sha256:11\n"
    )
    with pytest.raises(ValueError, match="has no c"):
        pinned(text, ["a", "c"])
