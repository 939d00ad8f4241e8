"""The command line, run in this process as users run it: words in; exit code, output and errors out."""

import sys
from dataclasses import dataclass

import pytest

from headrace_cli.main import main


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str


@pytest.fixture
def headrace(monkeypatch, capfd, tmp_path):
    """``headrace("status", "demo")``, with a home of its own; the folder that it runs in is ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADRACE_HOME", "home")

    def call(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["headrace", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        text = capfd.readouterr()
        assert "Traceback" not in text.err + text.out
        return Done(code if isinstance(code, int) else 0, text.out, text.err)

    return call
