"""Full or read-only disks, lost records, killed commands: reported and survived."""

import os
import shutil
import signal
import subprocess
import time

import pytest

from workplace import Workplace


def _agent_lives(headrace: Workplace) -> bool:
    return len(headrace.agents()) == 1 and headrace.stage("corpus").get("state") in ("Starting", "Running")


def _works(headrace: Workplace, run: "subprocess.Popen[str]") -> bool:
    """Whether this very command works on the run."""
    lock = headrace.home / "runs/small/lock"
    return lock.exists() and lock.read_text().startswith(f"{run.pid} ") and _agent_lives(headrace)


def _killed(headrace: Workplace) -> None:
    """``headrace run``, killed while its agent lives on."""
    run = headrace.start()
    headrace.wait_for(lambda: _agent_lives(headrace))
    run.kill()
    run.communicate()


@pytest.fixture
def small_home(waiting):
    """A home on a file system of 1 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    waiting.home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(waiting.home)], check=True)
    yield waiting
    subprocess.run(["umount", "-l", str(waiting.home)], check=True)


def _fill(headrace: Workplace) -> None:
    with (headrace.home / "filler").open("wb") as filler, pytest.raises(OSError):
        while True:
            os.write(filler.fileno(), bytes(4096))


def test_a_home_that_is_full_from_the_start(small_home):
    _fill(small_home)
    done = small_home("run", "run.yaml")
    assert done.code == 1
    assert "no space left on the device: free some, then run the same command again" in done.err
    assert str(small_home.home) in done.err
    assert len(done.err.splitlines()) == 1
    assert small_home.processes() == []
    (small_home.home / "filler").unlink()
    run = small_home.start()
    small_home.wait_for(lambda: _agent_lives(small_home))
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 130


def test_a_home_that_fills_up_while_a_stage_runs(small_home):
    """The next status cannot be written: everything ends, and goes on once there is room."""
    small_home.manifest_of(restartPolicy={"maxInfraRestarts": 2})
    run = small_home.start()
    small_home.wait_for(lambda: _agent_lives(small_home))
    _fill(small_home)
    os.kill(small_home.agents()[0].pid, signal.SIGKILL)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 1
    assert "status.json: no space left on the device" in err
    assert "Traceback" not in err
    assert small_home.processes() == []
    assert "Interrupted" in small_home("status", "small").out
    stopped = small_home("stop", "small")
    assert (stopped.code, "no space left" in stopped.err) == (1, True)
    (small_home.home / "filler").unlink()
    run = small_home.start()
    small_home.wait_for(lambda: _agent_lives(small_home))
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 130


def test_a_full_home_can_be_stopped(small_home):
    _killed(small_home)
    _fill(small_home)
    done = small_home("stop", "small")
    assert done.code == 1
    assert "no space left" in done.err
    assert small_home.processes() == []


def test_a_home_that_can_only_be_read(small_home):
    _killed(small_home)
    assert small_home("stop", "small").code == 0
    subprocess.run(["mount", "-o", "remount,ro", str(small_home.home)], check=True)
    for command in (("status", "small"), ("ls",), ("logs", "small"), ("plan", "run.yaml")):
        done = small_home(*command)
        assert (done.code, done.err) == (0, ""), command
    for command in (("run", "run.yaml"), ("stop", "small")):
        done = small_home(*command)
        assert done.code == 2
        assert "Read-only file system: make it writable, or choose another folder with --home" in done.err
        assert len(done.err.splitlines()) == 1


def test_a_home_below_a_file(waiting):
    waiting.home.write_text("")
    done = waiting("run", "run.yaml")
    assert done.code == 2
    assert f"{waiting.home}" in done.err
    assert "a file is where a folder is needed" in done.err


def _emptied(path):
    path.write_bytes(b"")


def _removed(path):
    path.unlink(missing_ok=True)  # the command may have been killed before it wrote it


@pytest.mark.parametrize("damage", [_emptied, _removed])
def test_agents_whose_record_was_lost_are_found(waiting, damage):
    """As when the command was killed between starting an agent and noting it."""
    _killed(waiting)
    (agent,) = waiting.agents()
    damage(waiting.home / "runs/small/attempts/corpus-1/processes.json")
    assert "To take over" in waiting("status", "small").out
    run = waiting.start()
    waiting.wait_for(lambda: _works(waiting, run))
    time.sleep(1)
    assert [a.pid for a in waiting.agents()] == [agent.pid]
    assert waiting.stage("corpus")["attempt"] == 1
    assert waiting("stop", "small").code == 0
    run.communicate(timeout=60)
    assert waiting.processes() == []


@pytest.mark.parametrize("record", ["status.json", "attempts/corpus-1/stage.json", "manifest.yaml", "lock"])
def test_a_run_goes_on_whatever_record_was_emptied(waiting, record):
    _killed(waiting)
    (agent,) = waiting.agents()
    waiting.wait_for(agent.net_connections)  # it has read what it was started for, and waits for storage
    _emptied(waiting.home / "runs/small" / record)
    run = waiting.start()
    waiting.wait_for(lambda: _works(waiting, run))
    kept = record != "status.json"
    waiting.wait_for(lambda: waiting.stage("corpus")["attempt"] == (1 if kept else 2))
    waiting.wait_for(lambda: [a.pid == agent.pid for a in waiting.agents()] == [kept])
    assert waiting("stop", "small").code == 0
    _, err = run.communicate(timeout=60)
    assert ("status.json: damaged" in err) == (record == "status.json")
    assert waiting.processes() == []


@pytest.mark.parametrize("record", ["status.json", "attempts/corpus-1/stage.json", "manifest.yaml", "lock"])
def test_a_run_can_be_stopped_whatever_record_was_emptied(waiting, record):
    _killed(waiting)
    _emptied(waiting.home / "runs/small" / record)
    done = waiting("stop", "small")
    assert (done.code, "damaged" in done.err) == ((1, True) if record == "status.json" else (0, False))
    assert waiting.processes() == []


def test_status_after_everything_was_killed(waiting):
    _killed(waiting)
    for process in waiting.processes():
        process.kill()
    waiting.wait_for(lambda: waiting.processes() == [])
    assert waiting.status()["summary"] == "Starting", "that is what was written last"
    done = waiting("status", "small")
    assert "Interrupted" in done.out
    assert f"headrace run {waiting.folder / 'run.yaml'} --home {waiting.home}" in done.out
    assert "Interrupted" in waiting("ls").out
    assert waiting("logs", "small", "-f").code == 0


def test_a_failed_run_that_is_run_again_has_its_budget_again(waiting):
    waiting.manifest_of(restartPolicy={"maxInfraRestarts": 1})
    run = waiting.start()
    for attempt in (1, 2):
        waiting.wait_for(lambda n=attempt: _agent_lives(waiting) and waiting.stage("corpus")["attempt"] == n)
        waiting.agents()[0].kill()
    _, err = run.communicate(timeout=60)
    assert run.returncode == 1, err
    assert "AgentVanished" in err
    run = waiting.start()
    for attempt in (3, 4):
        waiting.wait_for(lambda n=attempt: _agent_lives(waiting) and waiting.stage("corpus")["attempt"] == n)
        if attempt == 3:
            waiting.agents()[0].kill()
    assert waiting.stage("corpus")["infraSpent"] == 1
    assert waiting("stop", "small").code == 0
    run.communicate(timeout=60)


def test_removed_while_it_is_looked_at(waiting):
    _killed(waiting)
    looks = [waiting.start("logs", "small", "-f"), waiting.start("status", "small"), waiting.start("ls")]
    shutil.rmtree(waiting.home / "runs")
    for process in waiting.processes():
        process.kill()
    for look in looks:
        _, err = look.communicate(timeout=60)
        assert "Traceback" not in err
