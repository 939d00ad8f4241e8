"""What Megatron finds on a machine, before any model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace_trainer.engine.device.determinism import be_deterministic
from headrace_trainer.errors import UserError


def test_without_a_gpu_transformer_engine_is_left_alone_even_if_it_is_broken(tmp_path):
    broken = tmp_path / "transformer_engine" / "__init__.py"
    broken.parent.mkdir()
    broken.write_text("raise RuntimeError('curand shared object not found.')\n")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from headrace_trainer.engine.device import megatron; import megatron.core.utils as u; print(u.tex)",
        ],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("None\n", 0), done.stderr


def environment_of(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """What a rank that imports Megatron leaves for NCCL, cuBLAS and Transformer Engine, and sets in torch."""
    script = """
import json, os
from headrace_trainer.engine.device import megatron
import torch
names = ("NCCL_ALGO", "CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")
print(json.dumps({n: os.environ[n] for n in names} | {"torch": torch.are_deterministic_algorithms_enabled()}))
"""
    unset = ("NCCL_ALGO", "CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")
    env = {k: v for k, v in os.environ.items() if k not in unset} | variables
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, cwd=tmp_path)


def test_every_library_is_told_to_be_deterministic(tmp_path):
    assert json.loads(environment_of(tmp_path).stdout) == {
        "NCCL_ALGO": "Ring",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "torch": True,
    }


def test_another_deterministic_choice_is_kept(tmp_path):
    assert json.loads(environment_of(tmp_path, NCCL_ALGO="^NVLS").stdout)["NCCL_ALGO"] == "^NVLS"


@pytest.mark.parametrize(
    ("name", "value"),
    [("NCCL_ALGO", "Tree"), ("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")],
)
def test_a_choice_that_is_not_deterministic_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"^{name}: '{value}': results would differ"):
        be_deterministic({name: value})
