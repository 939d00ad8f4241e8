"""In CI a skip is a failure, wherever it is raised."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
WAYS = {
    "mark": "import pytest\n@pytest.mark.skipif(True, reason='x')\ndef test_it(): pass\n",
    "fixture": "import pytest\n@pytest.fixture\ndef f(): pytest.skip('x')\ndef test_it(f): pass\n",
    "test": "import pytest\ndef test_it(): pytest.skip('x')\n",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("ci", "code"), [("true", 1), ("", 0)])
def test_a_skip_fails_in_ci_and_only_there(tmp_path, way, ci, code):
    (tmp_path / "test_it.py").write_text(WAYS[way])
    env = dict(os.environ) | {"CI": ci, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "conftest", str(tmp_path / "test_it.py")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
