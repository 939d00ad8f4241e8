"""The agent before it has ranks: it stops when asked to, whatever it is waiting for."""

import signal
import socket
import subprocess
import sys

from headrace_api.contract import ResolvedStage
from headrace_api.faults import ExitCode
from headrace_api.run import Stage, Storage


def test_an_agent_that_waits_for_storage_stops_when_asked(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        storage = Storage(uri="s3://bucket/run", endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        stage = Stage.model_validate({"name": "corpus", "corpus": {"sources": [{"uri": str(tmp_path)}]}})
        resolved = ResolvedStage(
            run="test",
            stage=stage,
            attempt=1,
            seed=1,
            hash="0" * 64,
            inputs={},
            storage=storage,
            output_uri=storage.uri,
        )
        (tmp_path / "stage.json").write_text(resolved.model_dump_json(by_alias=True))
        agent = subprocess.Popen(
            [sys.executable, "-m", "headrace_trainer.agent", str(tmp_path / "stage.json")],
            env={
                "AWS_ACCESS_KEY_ID": "x",
                "AWS_SECRET_ACCESS_KEY": "x",
                "HEADRACE_SCRATCH": str(tmp_path / "scratch"),
                "HEADRACE_TERMINATION_FILE": str(tmp_path / "said"),
            },
        )
        try:
            silent.accept()  # it has asked, and gets no answer
            agent.send_signal(signal.SIGTERM)
            assert agent.wait(timeout=30) == ExitCode.STOPPED
        finally:
            agent.kill()
    assert not (tmp_path / "said").exists()
