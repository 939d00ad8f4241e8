"""The kernel's count of OOM kills, as cgroup v1 and v2 show it."""

import pytest

from headrace_trainer.agent.memory import oom_kills

V1 = "9:name=systemd:/\n4:cpu,memory:/pods/one\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/pods/one\n", {"pods/one/memory.events": "low 0\noom 3\noom_kill 2\n"}, 2),
        ("0::/pods/one\n", {"memory.events": "oom_kill 1\n"}, 1),
        (V1, {"memory/pods/one/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"}, 5),
        (V1, {"memory/memory.oom_control": "oom_kill_disable 0\noom_kill 4\n"}, 4),
        (V1, {"memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"}, None),
        ("0::/\n", {}, None),
    ],
    ids=["v2", "v2 in a container", "v1", "v1 in a container", "an old kernel", "nothing is mounted"],
)
def test_the_count(tmp_path, groups, files, expected):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert oom_kills(tmp_path) == expected


def test_without_proc_nothing_is_known(tmp_path):
    assert oom_kills(tmp_path) is None
