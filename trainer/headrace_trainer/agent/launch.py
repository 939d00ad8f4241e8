"""How the ranks of a pod are started: torchrun for gangs, one process for everything else."""

import os
import sys
from pathlib import Path

from headrace_api.contract import ResolvedStage
from headrace_api.stages import RunsAs
from headrace_trainer.agent.settings import Settings, default_threads


def rank_command(stage_file: Path, resolved: ResolvedStage, settings: Settings) -> list[str]:
    """The command that runs this pod's ranks.

    The pod's index is the node rank, so that a rank has the same number, and with it the same part of the model, in
    every attempt: torchrun's dynamic rendezvous would not promise that.
    """
    if resolved.stage.config.RUNS_AS is not RunsAs.GANG:
        return [sys.executable, "-m", "headrace_trainer.stage", str(stage_file)]
    compute = resolved.stage.compute
    return [
        *(sys.executable, "-m", "headrace_trainer.agent.gang"),
        f"--nnodes={compute.nodes}",
        f"--nproc-per-node={compute.ranks}",
        f"--node-rank={settings.index}",
        f"--master-addr={settings.master_addr}",
        f"--master-port={settings.master_port}",
        "--max-restarts=0",
        "--module",
        "headrace_trainer.stage",
        str(stage_file),
    ]


def rank_environment(resolved: ResolvedStage, settings: Settings) -> dict[str, str]:
    """The ranks' environment: the agent's, with what keeps libraries from the network and threads from each other."""
    env = dict(os.environ)
    env["HEADRACE_SCRATCH"] = str(settings.scratch)
    env["JOB_COMPLETION_INDEX"] = str(settings.index)
    env.setdefault("OMP_NUM_THREADS", str(default_threads(resolved.stage.compute.ranks)))
    env["TMPDIR"] = str(settings.scratch)  # what torchrun and others leave goes with the attempt
    env["HF_HUB_OFFLINE"] = "1"
    env["TOKENIZERS_PARALLELISM"] = env.get("TOKENIZERS_PARALLELISM", "true")
    env["PYTHONUNBUFFERED"] = "1"
    return env
