"""A stop request ends the run, whoever sends it and whatever the run is waiting for; no process outlives it."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from workplace import HEADRACE, Terminal, Workplace


def _agent_lives(headrace: Workplace) -> bool:
    return len(headrace.agents()) == 1 and headrace.stage("corpus").get("state") in ("Starting", "Running")


def _suspended(headrace: Workplace) -> None:
    assert headrace.processes() == []
    assert headrace.status()["summary"] == "Suspended"
    assert "Suspended" in headrace("status", "small").out


@pytest.mark.parametrize("holder", ["works", "was stopped with Ctrl-Z"])
def test_stop_from_another_terminal_stops_a_run(waiting, holder):
    run = waiting.start()
    waiting.wait_for(lambda: _agent_lives(waiting))
    if holder != "works":
        run.send_signal(signal.SIGSTOP)
    stopped = waiting("stop", "small")
    assert (stopped.code, stopped.err) == (0, "")
    assert "stopped corpus (attempt 1)" in stopped.out
    assert run.wait(timeout=10) == 130
    _suspended(waiting)
    assert "nothing was running" in waiting("stop", "small").out


def test_stop_stops_what_a_killed_command_left_running(waiting):
    run = waiting.start()
    waiting.wait_for(lambda: _agent_lives(waiting))
    run.kill()
    run.wait()
    seen = waiting("status", "small")
    assert "Starting" in seen.out
    assert f"To take over: headrace run {waiting.folder / 'run.yaml'} --home {waiting.home}" in seen.out
    assert "stopped corpus (attempt 1)" in waiting("stop", "small").out
    _suspended(waiting)


def test_a_second_ctrl_c_leaves_nothing_alive(waiting_rank):
    """Neither the agent nor its rank would end by itself: one is stopped, the other waits for its input."""
    run = waiting_rank.start()
    waiting_rank.wait_for(lambda: len(waiting_rank.ranks()) == 1)
    waiting_rank.agents()[0].suspend()
    run.send_signal(signal.SIGINT)
    note = waiting_rank.home / "runs/small/attempts/corpus-1/stop-requested"
    waiting_rank.wait_for(note.exists)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 130
    _suspended(waiting_rank)


def test_an_agent_that_does_not_stop_within_its_grace_period_is_killed(waiting_rank):
    waiting_rank.env["HEADRACE_GRACE_SECONDS"] = "0"
    run = waiting_rank.start()
    waiting_rank.wait_for(lambda: len(waiting_rank.ranks()) == 1)
    waiting_rank.agents()[0].suspend()
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=120) == 130
    _suspended(waiting_rank)


def test_a_closed_terminal_suspends(waiting):
    # setsid --ctty: the terminal is the command's own, so that closing it sends SIGHUP.
    terminal = Terminal("setsid", "--ctty", *waiting.command("run", "run.yaml"), workplace=waiting)
    waiting.wait_for(lambda: _agent_lives(waiting))
    terminal.hang_up()
    waiting.wait_for(lambda: waiting.status()["summary"] == "Suspended")
    terminal.process.wait(timeout=30)
    _suspended(waiting)


def test_nohup_is_respected(waiting):
    run = subprocess.Popen(
        ["sh", "-c", f"trap '' HUP; exec {HEADRACE} run run.yaml --home {waiting.home}"],
        cwd=waiting.folder, env=waiting.env, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    waiting.wait_for(lambda: _agent_lives(waiting))
    run.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert waiting.status()["summary"] == "Starting"
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 130


def test_stop_at_any_moment_of_a_start_leaves_nothing_alive(waiting):
    seed = int(os.environ.get("HEADRACE_TEST_SEED", random.randrange(10**6)))
    draw = random.Random(seed)
    print(f"HEADRACE_TEST_SEED={seed}")
    for _ in range(2):
        run = waiting.start()
        time.sleep(draw.uniform(0, 3))
        stopped = waiting("stop", "small")
        if "nothing was running" in stopped.out or "no such run" in stopped.err:
            run.send_signal(signal.SIGTERM)  # it had not begun
        else:
            assert stopped.code == 0, stopped.err
        run.communicate(timeout=60)
        assert waiting.processes() == []


def test_two_runs_at_once_are_one(waiting):
    runs = [waiting.start(), waiting.start()]
    waiting.wait_for(lambda: any(run.poll() is not None for run in runs))
    (refused,) = [run for run in runs if run.poll() is not None]
    (holder,) = [run for run in runs if run.poll() is None]
    assert refused.returncode == 2
    assert f"another headrace process is running it, process {holder.pid}" in refused.communicate()[1]
    waiting.wait_for(lambda: _agent_lives(waiting))
    assert waiting("stop", "small").code == 0
    assert holder.wait(timeout=30) == 130


def test_a_run_whose_folder_is_removed_ends_with_everything_that_it_started(waiting_rank):
    run = waiting_rank.start()
    waiting_rank.wait_for(lambda: len(waiting_rank.ranks()) == 1)
    shutil.rmtree(waiting_rank.home / "runs")
    _, err = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "removed while the run was using it" in err
    assert len(err.split("error:")) == 2
    assert waiting_rank.processes() == []
    assert not (waiting_rank.home / "runs").exists()
