"""Faults in real runs: killed ranks restart, and every later loss is equal, bit for bit.

The stages before pretraining are shared: a run that names them again skips them.
"""

import os
import random
import signal

import psutil
import pytest

from workplace import Workplace

DATA = ("corpus", "tok", "tokens")
RESTARTS = {"maxInfraRestarts": 3}


@pytest.fixture(scope="module")
def headrace(tmp_path_factory):
    """A home with the data stages done, and a pretrain stage ``base`` that nothing disturbed."""
    workplace = Workplace(tmp_path_factory.mktemp("recovery"))
    workplace.write_text()
    workplace.manifest(*DATA, "base")
    done = workplace("run", "run.yaml")
    assert done.code == 0, done.err
    assert workplace.stage("base")["attempt"] == 1
    yield workplace
    workplace("stop", "small")
    left = workplace.processes()
    for process in left:
        process.kill()
    assert left == [], "processes outlived their run"


def _ranks(headrace: Workplace) -> list[psutil.Process]:
    """The running ranks, by number: a launcher forks them, and each names itself."""
    launchers = [p for p in headrace.processes() if p.name() == "launcher"]
    return sorted((p for launcher in launchers for p in launcher.children()), key=lambda p: p.name())


def test_a_second_run_skips_every_finished_stage(headrace):
    headrace.manifest(*DATA, "base")
    done = headrace("run", "run.yaml")
    assert done.code == 0
    assert [s["attempt"] for s in headrace.status()["stages"]] == [1, 1, 1, 1]
    assert "AttemptStarted" not in done.err


def test_a_rank_that_is_killed_at_a_random_step_changes_no_later_loss(headrace):
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    at = draw.randint(6, 34)
    print(f"seed {seed}: one rank is killed at step {at}")
    headrace.manifest(*DATA, "base-killed", restartPolicy=RESTARTS)
    run = headrace.start()
    headrace.wait_for(lambda: headrace.step("base-killed") >= at and len(_ranks(headrace)) == 2)
    draw.choice(_ranks(headrace)).send_signal(signal.SIGKILL)
    _, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    assert "was killed by SIGKILL" in err
    status = headrace.stage("base-killed")
    assert (status["attempt"], status["infraRestarts"]) == (2, 1)
    assert headrace.losses("base-killed") == headrace.losses("base")
    assert len(headrace.losses("base")) == 40


def test_a_rank_that_is_held_is_found_and_changes_no_later_loss(headrace):
    policy = {**RESTARTS, "onStall": "10s"}
    headrace.manifest(*DATA, "base-held", restartPolicy=policy)
    run = headrace.start()
    headrace.wait_for(lambda: headrace.step("base-held") >= 6 and len(_ranks(headrace)) == 2)
    _ranks(headrace)[1].send_signal(signal.SIGSTOP)
    _, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    assert "rank 1 hangs (stopped by a signal or debugger): phase Running" in err
    status = headrace.stage("base-held")
    assert (status["attempt"], status["infraRestarts"]) == (2, 1)
    stacks = (headrace.artifact("base-held") / "evidence/attempt-1/pod-0/stacks.txt").read_text()
    assert "Loop._train_step" in stacks
    assert headrace.losses("base-held") == headrace.losses("base")


def test_ctrl_c_suspends_with_a_checkpoint_and_running_again_goes_on(headrace):
    headrace.manifest(*DATA, "base-stopped")
    run = headrace.start()
    headrace.wait_for(lambda: headrace.step("base-stopped") >= 7)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 130, err
    status = headrace.status()
    assert status["summary"] == "Suspended"
    saved = status["checkpoint"]["step"]
    assert 7 <= saved <= 40
    assert headrace.processes() == []
    done = headrace("run", "run.yaml")
    assert done.code == 0, done.err
    assert headrace.stage("base-stopped")["attempt"] == 2
    assert headrace.status()["restarts"] == 0
    assert headrace.losses("base-stopped") == headrace.losses("base")


def test_killing_the_command_line_changes_nothing(headrace):
    headrace.manifest(*DATA, "base-orphan")
    run = headrace.start()
    headrace.wait_for(lambda: headrace.step("base-orphan") >= 3)
    run.kill()
    run.communicate()
    done = headrace("run", "run.yaml")
    assert done.code == 0, done.err
    assert headrace.stage("base-orphan")["attempt"] == 1
    assert headrace.losses("base-orphan") == headrace.losses("base")


def test_an_agent_that_is_killed_takes_its_ranks_with_it_and_is_replaced(headrace):
    headrace.manifest(*DATA, "base-agent", restartPolicy=RESTARTS)
    run = headrace.start()
    headrace.wait_for(lambda: headrace.step("base-agent") >= 3 and len(_ranks(headrace)) == 2)
    ranks = _ranks(headrace)
    agent = next(p for p in headrace.processes() if "headrace_trainer.agent" in p.cmdline())
    os.kill(agent.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert alive == []
    _, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    assert headrace.stage("base-agent")["infraRestarts"] == 1, err
    assert headrace.losses("base-agent") == headrace.losses("base")


def test_only_one_command_works_on_a_run_at_a_time(headrace):
    headrace.manifest(*DATA, "base-busy")
    run = headrace.start()
    headrace.wait_for(lambda: headrace.status().get("stage") == "base-busy")
    second = headrace("run", "run.yaml")
    assert second.code == 2
    assert "another headrace process is running it" in second.err
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=120)
