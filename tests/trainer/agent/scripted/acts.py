"""A stage that does what ``HEADRACE_TEST_SCRIPT`` says: for each rank, or for all under "*", a list of acts."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from headrace_trainer.errors import Stopped, UserError

IMPORTED_BY = os.getpid()
SCRIPT = json.loads(os.environ["HEADRACE_TEST_SCRIPT"])

if SCRIPT.get("import") == "fails":
    raise ImportError("no such library")
if SCRIPT.get("import") == "takes for ever":
    time.sleep(3600)
if SCRIPT.get("import") == "starts a thread":
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()


def run(ctx):
    ctx.done = 0
    acts = SCRIPT.get(str(ctx.rank), SCRIPT.get("*", []))
    for name, *args in acts:
        globals()[name](ctx, *args)
    return {"done": float(ctx.done)}


def steps(ctx, count, seconds=0.02, save_seconds=0.0):
    """Take steps, as a loop does: after each, report; when asked to stop, save."""
    for _ in range(count):
        time.sleep(seconds)
        ctx.done += 1
        ctx.report(phase="Running", done=ctx.done)
        if ctx.stop_requested():
            phase(ctx, "Saving", save_seconds)
            raise Stopped("saved", step=ctx.done)


def phase(ctx, name, seconds):
    ctx.report(phase=name, done=ctx.done)
    time.sleep(seconds)


def stop_itself(ctx):
    os.kill(os.getpid(), signal.SIGSTOP)


def deadlock(ctx):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def wait_for_others(ctx):
    from distributed_c10d import all_reduce

    all_reduce()


def work_in_silence(ctx, seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def sleep(ctx, seconds):
    time.sleep(seconds)


def leave_a_session(ctx):
    """Leave a process in a session of its own, whose parent is gone."""
    code = "import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(3600)\n"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)


def fail(ctx, message):
    raise UserError(message)


def exit_with(ctx, code):
    os._exit(code)


def kill_itself(ctx, name):
    os.kill(os.getpid(), signal.Signals[name])


def fill_the_disk(ctx):
    """From now on this process can write no byte to any file, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def eat_memory(ctx, megabytes):
    eaten = [bytearray(os.urandom(1 << 20)) for _ in range(megabytes)]
    time.sleep(len(eaten))


def write(ctx, name):
    (ctx.scratch / name).write_bytes(bytes(100_000))


def describe(ctx):
    """Leave what this process is."""
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    said = {key: os.environ.get(key) for key in keys}
    said |= {"pid": os.getpid(), "parent": os.getppid(), "imported_by": IMPORTED_BY}
    (Path(os.environ["HEADRACE_TEST_FOLDER"]) / f"rank-{ctx.rank}.json").write_text(json.dumps(said))
