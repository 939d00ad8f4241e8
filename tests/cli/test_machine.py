"""What this machine cannot run is reported before anything starts."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders import STAGES, manifest
from headrace_api.errors import parse_run
from headrace_cli import machine
from headrace_cli.machine import Finding, Machine, Severity, check, this_machine

GIB = 2**30
LAPTOP = Machine(memory=16 * GIB)
ONE_GPU = Machine(memory=64 * GIB, gpu_memory=(24 * GIB,))
EIGHT_GPUS = Machine(memory=512 * GIB, gpu_memory=(80 * GIB,) * 8)


def findings(
    tmp_path: Path, there: Machine, *, compute: Any = None, stages: Any = None, **pretrain: Any
) -> list[Finding]:
    """What is found about a run whose storage and sources are in order."""
    (tmp_path / "raw").mkdir(exist_ok=True)
    value = manifest(storage={"uri": str(tmp_path / "store")})
    value["spec"]["stages"][0]["corpus"]["sources"] = [{"uri": str(tmp_path / "raw")}]
    base = value["spec"]["stages"][3]
    base["compute"], base["pretrain"] = compute or {}, STAGES["base"]["pretrain"] | {"parallelism": {}} | pretrain
    return check(parse_run(value), there, stages=stages or list(STAGES))


CASES: list[tuple[Machine, dict[str, Any], Severity | None, str]] = [
    (LAPTOP, {}, None, ""),
    (LAPTOP, {"compute": {"gpusPerNode": 8}}, Severity.WARNING, "compute.gpusPerNode: 8: this machine has no GPU; its 8 ranks share"),
    (LAPTOP, {"compute": {"gpusPerNode": 8}, "precision": "fp8"}, Severity.ERROR, "pretrain.precision: 'fp8': this machine has no GPU; use bf16"),
    (ONE_GPU, {"compute": {"gpusPerNode": 1}}, None, ""),
    (ONE_GPU, {"compute": {"gpusPerNode": 2}}, Severity.ERROR, "compute.gpusPerNode: 2: this machine has 1 of the 2 GPUs"),
    (EIGHT_GPUS, {"compute": {"nodes": 2, "gpusPerNode": 8}}, Severity.ERROR, "compute.gpusPerNode: 8: this machine has 8 of the 16 GPUs"),
    # 1.28B parameters with two tables of 4096: 16 layers of 60.8M, 16.8M, norms; 16 bytes each in fp32.
    (LAPTOP, {"model": {"preset": "llama-1b"}}, None, ""),
    (LAPTOP, {"model": {"preset": "llama-7b"}}, Severity.ERROR, "pretrain: weights, gradients and optimizer state take 104.2 GB per rank, but 1 share"),
    (LAPTOP, {"model": {"preset": "llama-1b"}, "compute": {"ranksPerNode": 2}}, Severity.ERROR, "pretrain: weights, gradients and optimizer state take"),
    (ONE_GPU, {"model": {"preset": "llama-7b"}, "compute": {"gpusPerNode": 1}}, Severity.ERROR, "but a GPU here has 25.8 GB"),
    (EIGHT_GPUS, {"model": {"preset": "llama-7b"}, "compute": {"gpusPerNode": 8}, "precision": "bf16"}, None, ""),
    (
        EIGHT_GPUS,
        {
            "model": {"preset": "llama-7b"}, "compute": {"gpusPerNode": 8}, "precision": "bf16", "tokens": "1G",
            "microBatchSize": 4, "sequenceLength": 8192, "globalBatchSize": 32,
        },
        Severity.WARNING,
        "pretrain.microBatchSize: state and activations take about",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("there", "asked", "severity", "text"), CASES)
def test_a_gang_is_held_against_the_machine(
    tmp_path: Path, there: Machine, asked: dict[str, Any], severity: Severity | None, text: str
) -> None:
    found = findings(tmp_path, there, **asked)
    assert [f.severity for f in found] == ([] if severity is None else [severity]), found
    assert all(f.text.startswith("spec.stages[3].") and text in f.text for f in found), found


def test_a_stage_that_will_not_run_needs_nothing(tmp_path: Path) -> None:
    assert findings(tmp_path, LAPTOP, model={"preset": "llama-70b"}, stages=["corpus", "eval"]) == []


@pytest.fixture
def here(tmp_path: Path) -> Any:
    """Writes ``run.yaml`` with the named stages."""

    def write(*stages: str, **spec: Any) -> str:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(manifest(*stages, **spec)))
        return "run.yaml"

    return write


def test_validate_warns_and_run_refuses_before_anything_is_started(headrace: Any, here: Any, tmp_path: Path) -> None:
    file = here("corpus", storage={"uri": "store"})
    missing = "spec.stages[0].corpus.sources[0].uri: '/raw': no such file or folder; check the path"
    done = headrace("validate", file)
    assert (done.code, done.err) == (0, f"warning: here: {missing}\n")
    done = headrace("run", file)
    assert (done.code, done.err) == (2, f"error: {missing}\n")
    assert not list(tmp_path.rglob("attempts"))
    assert not (tmp_path / "store").exists()


def test_a_source_and_a_tokenizer_are_looked_for_beside_the_manifest(headrace: Any, tmp_path: Path) -> None:
    value = manifest("corpus", "tok")
    value["spec"]["stages"][0]["corpus"]["sources"] = [
        {"uri": "s3://bucket/text"},
        {"uri": "text"},
        {"uri": f"file://{tmp_path}/more"},
    ]
    value["spec"]["stages"][1]["tokenizer"] = {"import": {"uri": "gpt2"}}
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "run.yaml").write_text(yaml.safe_dump(value))
    told = headrace("validate", "sub/run.yaml").err
    assert f"stages[0].corpus.sources[1].uri: '{tmp_path}/sub/text': no such file" in told
    assert f"stages[0].corpus.sources[2].uri: 'file://{tmp_path}/more': no such file" in told
    assert f"stages[1].tokenizer.import.uri: '{tmp_path}/sub/gpt2': no such file" in told
    assert "s3://" not in told
    for path in ("sub/text", "more", "sub/gpt2"):
        (tmp_path / path).mkdir()
    assert headrace("validate", "sub/run.yaml").err == ""


def test_a_storage_that_is_a_file_or_below_one(headrace: Any, here: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for uri in ("file", "file/below", f"file://{tmp_path}/file"):
        done = headrace("run", here("corpus", storage={"uri": uri}))
        assert done.code == 2
        assert (
            f"error: spec.storage.uri: '{tmp_path}/{'file/below' if 'below' in uri else 'file'}': {tmp_path}/file is a file; name a folder"
            in done.err
        )


def test_a_storage_that_cannot_be_written_to(headrace: Any, here: Any) -> None:
    # Even root cannot write here.
    done = headrace("run", here("corpus", storage={"uri": "/proc/1/store"}))
    assert done.code == 2
    assert "spec.storage.uri: '/proc/1/store': /proc/1 is not writable; name another folder" in done.err


def test_gpus_that_a_process_may_not_see_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 81559\necho 81559\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for visible, count in ((None, 2), ("0", 1), ("", 0), ("-1", 0), ("0,1", 2)):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert this_machine().gpu_memory == (81559 * 2**20,) * count
    smi.write_text("#!/bin/sh\necho broken driver\nexit 9\n")
    assert this_machine().gpu_memory == ()


def test_a_containers_memory_is_its_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = this_machine().memory
    for limit, memory in (("1073741824", GIB), ("max", whole), (str(2**60), whole)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        monkeypatch.setattr(machine, "_CGROUP_MEMORY", tmp_path / "memory.max")
        assert this_machine().memory <= memory
    assert this_machine().memory > 0
