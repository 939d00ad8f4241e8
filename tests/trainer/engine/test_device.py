"""What Megatron finds on a machine, before any model."""

import os
import subprocess
import sys


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
