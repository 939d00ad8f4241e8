"""A small real model as an export leaves it, deployed under the real agent."""

import os
import pydoc_data.topics
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from headrace_api.artifact import ArtifactRef, stage_hash
from headrace_api.contract import Progress, ResolvedStage
from headrace_api.faults import Outcome
from headrace_api.run import Stage, Storage
from headrace_api.stages.base import ArtifactKind

FIRST_PORT = 18080
ENGINE = os.environ.get("HEADRACE_TEST_ENGINE", "transformers")
"""The engine under test; vllm, where it is on the path."""


def write_model(folder: Path) -> None:
    """A Llama of two layers and a byte-level BPE tokenizer, with weights large enough to disagree about tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    from headrace_trainer.formats.tokenizer import END_OF_TEXT, save_tokenizer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(list(pydoc_data.topics.topics.values())[:20], trainer)
    save_tokenizer(tokenizer, folder, eod=END_OF_TEXT)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=128,  # heads of 32: vLLM has no smaller ones
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def resolved_stage(
    storage: Path, *, kind: str, config: dict[str, Any], inputs: dict[str, ArtifactRef] | None = None, **fields: Any
) -> ResolvedStage:
    """A resolved stage whose name is its kind's, unless ``name`` says otherwise."""
    name, inputs = fields.pop("name", kind), inputs or {}
    stage = Stage.model_validate({"name": name, kind: config})
    return ResolvedStage(
        run="test",
        stage=stage,
        attempt=1,
        seed=7,
        hash=stage_hash(stage.config, seed=7, inputs={slot: ref.digest for slot, ref in inputs.items()}),
        inputs=inputs,
        storage=Storage(uri=str(storage)),
        output_uri=f"{storage}/{name}",
        **fields,
    )


def commit_model(folder: Path) -> ArtifactRef:
    """The model as the committed artifact of the stage ``ship``, in a storage folder below ``folder``."""
    from headrace_trainer import artifacts
    from headrace_trainer.storage import open_store

    (folder / "model").mkdir()
    write_model(folder / "model")
    resolved = resolved_stage(folder / "storage", kind="export", name="ship", config={"from": {"model": "base"}})
    store = open_store(resolved.storage)
    artifacts.upload_part(store, resolved, folder / "model", index=0)
    artifact = artifacts.commit(store, resolved, metrics={}, started=time.time())
    return ArtifactRef(uri=resolved.output_uri, digest=artifact.digest, kind=ArtifactKind.HUGGINGFACE)


def deploy_stage(storage: Path, model: ArtifactRef, **fields: Any) -> ResolvedStage:
    """A deploy stage of ``model``; ``fields`` are the typed block's, and ``progress_url``."""
    progress_url = fields.pop("progress_url", None)
    config = {"from": {"model": "ship"}, "port": FIRST_PORT} | fields
    return resolved_stage(storage, kind="deploy", config=config, inputs={"model": model}, progress_url=progress_url)


class Deployment:
    """A deploy stage under the real agent, in a process of its own."""

    def __init__(
        self, folder: Path, storage: Path, model: ArtifactRef, *, port: int, reports: bool = True, **env: str
    ) -> None:
        self.folder, self.scratch = folder, folder / "scratch"
        progress_url = f"file://{folder}/progress.json" if reports else None
        resolved = deploy_stage(storage, model, port=port, progress_url=progress_url, engine=ENGINE)
        (folder / "stage.json").write_text(resolved.model_dump_json(by_alias=True, exclude_none=True))
        self.env = {k: v for k, v in os.environ.items() if k != "KUBERNETES_SERVICE_HOST"} | {
            "HEADRACE_SCRATCH": str(self.scratch),
            "HEADRACE_TERMINATION_FILE": str(folder / "outcome.json"),
            "OMP_NUM_THREADS": "1",
            **env,
        }
        with (folder / "agent.log").open("w") as log:
            self.agent = subprocess.Popen(
                [sys.executable, "-m", "headrace_trainer.agent", str(folder / "stage.json")],
                env=self.env,
                stdout=log,
                stderr=log,
            )

    def progress(self) -> Progress | None:
        """The newest report."""
        try:
            return Progress.model_validate_json((self.folder / "progress.json").read_text())
        except FileNotFoundError:
            return None

    def outcome(self) -> Outcome:
        """What the agent left at its end."""
        return Outcome.model_validate_json((self.folder / "outcome.json").read_text())

    def processes(self) -> list[psutil.Process]:
        """The agent's descendants: the rank and the engine."""
        return psutil.Process(self.agent.pid).children(recursive=True)

    def engine(self) -> psutil.Process | None:
        """The engine, if it has been started."""
        return next((p for p in self.processes() if "serve" in command_line(p)), None)

    def ready(self) -> int:
        """The exit code of the readiness probe."""
        command = [sys.executable, "-m", "headrace_trainer.stages.deploy.ready"]
        return subprocess.run(command, env=self.env, capture_output=True, timeout=30).returncode

    def wait_for(self, condition: Callable[[], object], *, seconds: float = 300) -> None:
        """Poll until something is so."""
        deadline = time.monotonic() + seconds
        while not condition():
            log = (self.folder / "agent.log").read_text()[-3000:]
            assert time.monotonic() < deadline, f"not in {seconds} s; the log ends with:\n{log}"
            assert self.agent.poll() is None, f"the agent has ended:\n{log}"
            time.sleep(0.1)

    def serving(self) -> bool:
        """Whether a completion was answered."""
        progress = self.progress()
        return progress is not None and progress.phase == "Serving"

    def end(self) -> None:
        """Kill the agent; what it started goes with it."""
        if self.agent.poll() is None:
            self.agent.send_signal(signal.SIGKILL)
        self.agent.wait()


def command_line(process: psutil.Process) -> list[str]:
    """A process's words; none for one that is gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def gone(processes: list[psutil.Process], *, seconds: float = 10) -> bool:
    """Whether every one of some processes ends in time; one that nobody has waited for counts as ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
            return True
        time.sleep(0.05)
    return False
