"""Process trees are killed completely, whatever their sessions and however fast they grow."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from headrace_trainer.processes import cpu_seconds, is_stopped, tree

ROOT = """
import os, subprocess, sys
from headrace_trainer.processes import adopt_orphans, kill_tree, tree
adopt_orphans()
child = subprocess.Popen([sys.executable, "-S", "-c", sys.argv[1]])
print("started", flush=True)
sys.stdin.readline()
kill_tree(os.getpid())
print(len(tree(os.getpid())), flush=True)
"""
ORPHANS = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
"""
GROWING = """
import os, time
for _ in range(200):  # only this process forks: the growth is slow, and it ends
    time.sleep(0.02)
    if os.fork() == 0:
        os.setsid()
        time.sleep(60)
        os._exit(0)
time.sleep(60)
"""


@pytest.mark.parametrize(("child", "least"), [(ORPHANS, 3), (GROWING, 2)], ids=["orphans", "one that goes on forking"])
def test_nothing_is_left_of_a_tree(child, least):
    root = subprocess.Popen(
        [sys.executable, "-c", ROOT, child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert root.stdout is not None
    assert root.stdin is not None
    assert root.stdout.readline() == "started\n"
    deadline = time.monotonic() + 60
    while len(tree(root.pid)) < least:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    out, _ = root.communicate("go\n", timeout=60)
    assert out == "0\n"
    assert not [p for p in psutil.process_iter() if child in _words(p)]


def _words(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_process_that_is_held_is_told_from_one_that_sleeps():
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(3600)"])
    try:
        assert not is_stopped(child.pid)
        psutil.Process(child.pid).suspend()
        deadline = time.monotonic() + 60
        while not is_stopped(child.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    assert not is_stopped(child.pid)


def test_the_processor_time_of_ended_children_counts():
    before = cpu_seconds(os.getpid())
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)
    assert cpu_seconds(os.getpid()) - before >= 0.25
    assert cpu_seconds(_unused_pid()) == 0.0


def _unused_pid() -> int:
    return int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
