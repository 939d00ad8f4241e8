"""A folder with real text and a manifest, and the command line as users start it."""

import copy
import json
import os
import pty
import pydoc_data.topics
import re
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import yaml

HEADRACE = Path(sys.executable).parent / "headrace"
T = TypeVar("T")

STAGES: dict[str, dict[str, Any]] = {
    "corpus": {
        "corpus": {
            "sources": [{"uri": "raw"}],
            "quality": {
                "minWords": 20,
                "minAlphabeticWordRatio": 0.5,
                "maxSymbolToWordRatio": 1.0,
                "maxBulletLineRatio": 1.0,
            },
        }
    },
    "tok": {"tokenizer": {"from": {"corpus": "corpus"}, "vocabSize": 512}},
    "tokens": {"shards": {"from": {"corpus": "corpus", "tokenizer": "tok"}, "validationRatio": 0.1}},
    "base": {
        "compute": {"ranksPerNode": 2},
        "pretrain": {
            "from": {"shards": "tokens"},
            "model": {"layers": 2, "hiddenSize": 32, "heads": 4, "kvHeads": 2, "ffnHiddenSize": 64},
            "tokens": 40 * 8 * 32,
            "sequenceLength": 32,
            "globalBatchSize": 8,
            "microBatchSize": 4,
            "precision": "fp32",
            "parallelism": {"tensor": 2},
            "schedule": {"learningRate": 1e-2, "warmup": 4},
            "checkpoint": {"every": 5, "keep": 2},
            "validation": {"every": 20, "samples": 4},
        },
    },
    "eval": {"evaluate": {"from": {"model": "base", "shards": "tokens"}, "maxTokens": 2000}},
    "ship": {"export": {"from": {"model": "base"}}},
    "serve": {"deploy": {"from": {"model": "ship"}}},
}


@dataclass
class Done:
    """A finished command."""

    code: int
    out: str
    err: str


class Workplace:
    """A folder with raw text and a manifest, and the commands on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | {"OMP_NUM_THREADS": "1"}

    def write_text(self, *, repeat: int = 1) -> None:
        """Python's language reference, topic by topic: real prose that comes with every Python."""
        raw = self.folder / "raw"
        raw.mkdir(exist_ok=True)
        for name, text in pydoc_data.topics.topics.items():
            (raw / f"{name.replace('/', '-')}.txt").write_text(text * repeat)

    def manifest(
        self,
        *names: str,
        stages: dict[str, dict[str, Any]] | None = None,
        edit: Callable[[dict[str, Any]], None] | None = None,
        **spec: Any,
    ) -> Path:
        """Write a manifest with the named stages, then ``stages``; ``edit`` changes them by name.

        A name may have a suffix: ``base-killed`` is the stage ``base`` under another name.
        """
        named = {n: {"name": n, **copy.deepcopy(STAGES[n.partition("-")[0]])} for n in names}
        named |= {n: {"name": n, **copy.deepcopy(stage)} for n, stage in (stages or {}).items()}
        if edit is not None:
            edit(named)
        spec = {"restartPolicy": {"maxInfraRestarts": 0}, **spec, "stages": list(named.values())}
        path = self.folder / "run.yaml"
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "headrace.dev/v1alpha1",
                    "kind": "TrainingRun",
                    "metadata": {"name": "small"},
                    "spec": spec,
                }
            )
        )
        return path

    def __call__(self, *words: str, timeout: float = 600) -> Done:
        """Run ``headrace WORDS --home HOME``."""
        done = subprocess.run(
            self.command(*words), capture_output=True, text=True, cwd=self.folder, env=self.env, timeout=timeout
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def command(self, *words: str) -> list[str]:
        """``headrace WORDS --home HOME``."""
        return [str(HEADRACE), *words, *([] if words[0] == "validate" else ["--home", str(self.home)])]

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """``headrace run run.yaml``, or other words, in the background."""
        return subprocess.Popen(
            self.command(*(words or ("run", "run.yaml"))),
            cwd=self.folder,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def status(self) -> dict[str, Any]:
        """``status.json``."""
        try:
            return json.loads((self.home / "runs/small/status.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def stage(self, name: str) -> dict[str, Any]:
        """One stage's status."""
        return next((s for s in self.status().get("stages", []) if s["name"] == name), {})

    def artifact(self, stage: str) -> Path:
        """A stage's folder in the default storage."""
        return self.home / "runs/small/artifacts" / stage

    def wait_for(self, condition: Callable[[], T], *, seconds: float = 120) -> T:
        """Poll until a condition holds; what it gave."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"not in {seconds} s; status: {json.dumps(self.status())[:2000]}"
            time.sleep(0.05)
        return found

    def step(self, stage: str) -> int:
        """The step that a running pretrain stage has reported; -1 while another stage runs."""
        status = self.status()
        return int(status.get("step", "0").split("/")[0]) if status.get("stage") == stage else -1

    def losses(self, stage: str) -> list[str]:
        """The loss of every step of a finished pretrain stage, bit for bit."""
        lines = (self.artifact(stage) / "history.jsonl").read_text().splitlines()
        return [row["loss_hex"] for row in map(json.loads, lines)]

    def agents(self) -> list[psutil.Process]:
        """The agents of this home's attempts."""
        found = self.processes()
        return [p for p in found if "headrace_trainer.agent" in _command(p) and p.pid == os.getsid(p.pid)]

    def ranks(self) -> list[psutil.Process]:
        """The ranks of this home's attempts."""
        return [
            p for p in self.processes() if "headrace_trainer.stage" in _command(p) and "--nnodes=1" not in _command(p)
        ]

    def processes(self) -> list[psutil.Process]:
        """Every process that belongs to this home's attempts."""
        found = []
        for process in psutil.process_iter():
            try:
                words = [*process.cmdline(), process.environ().get("HEADRACE_SCRATCH", "")]
                if any(str(self.home) in word for word in words) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


class Terminal:
    """A command on a terminal of 80 columns, which somebody reads."""

    def __init__(self, *command: str, workplace: Workplace) -> None:
        self._controller, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (24, 80))
        env = {k: v for k, v in workplace.env.items() if k not in ("COLUMNS", "NO_COLOR")} | {"TERM": "xterm"}
        self.process = subprocess.Popen(
            command, cwd=workplace.folder, env=env, stdin=terminal, stdout=terminal, stderr=terminal
        )
        os.close(terminal)
        self._chunks: list[bytes] = []
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while not self._closing.is_set():
            if select.select([self._controller], [], [], 0.1)[0]:
                try:
                    self._chunks.append(os.read(self._controller, 65536))
                except OSError:
                    return  # the other side is closed

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._controller, text.encode())

    def wait_for(self, text: str, *, times: int = 1, seconds: float = 120) -> None:
        """Wait until a text was shown that often."""
        deadline = time.monotonic() + seconds
        while b"".join(self._chunks).decode(errors="replace").count(text) < times:
            assert time.monotonic() < deadline, b"".join(self._chunks).decode(errors="replace")[-2000:]
            time.sleep(0.05)

    def hang_up(self) -> None:
        """Close the terminal."""
        self._closing.set()
        self._reader.join()
        os.close(self._controller)

    def finish(self, *, seconds: float = 240) -> tuple[int, str]:
        """Exit code, and every line that was ever shown, without its colours."""
        code = self.process.wait(timeout=seconds)
        self._reader.join(timeout=10)
        self.hang_up()
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(self._chunks).decode())
        return code, shown.replace("\r", "\n")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
