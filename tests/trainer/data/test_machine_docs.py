"""Text that every installation has: four formats, bounded, reproducible, and English that a corpus stage keeps."""

import ast
import gzip
import json
import os
import subprocess
import sys

import pytest

from headrace_trainer.errors import UserError
from headrace_trainer.formats.documents import read_report
from headrace_trainer.stages.corpus import run
from headrace_trainer.stages.corpus.machine_docs import docstrings, manuals, pages, readmes
from headrace_trainer.stages.corpus.machine_docs.found import Found, up_to
from headrace_trainer.stages.corpus.machine_docs.render import render_all
from headrace_trainer.stages.corpus.readers.html import main_text
from trainer.data.builders import corpus_config, make_context

MAX_MB = 1.0
FORMATS = ("jsonl", "parquet", "text", "warc")


def gather(out, **environment):
    command = [
        sys.executable,
        "-m",
        "headrace_trainer.stages.corpus.machine_docs",
        "--out",
        str(out),
        "--max-mb",
        str(MAX_MB),
    ]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs") / "raw"
    done = gather(out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def content_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_format_is_written_and_listed(gathered):
    out, table = gathered
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
    assert {*rows} == {"format", *FORMATS, "all"}
    for name in FORMATS:
        assert int(rows[name][0].replace(",", "")) == sum(p.is_file() for p in (out / name).rglob("*")) > 0
    assert 0.8 * MAX_MB < float(rows["all"][2]) <= MAX_MB


def test_the_corpus_stage_keeps_most_of_it(gathered, tmp_path):
    out, _ = gathered
    config = corpus_config(*(out / name for name in FORMATS))
    context = make_context(tmp_path, kind="corpus", config=config)
    run(context)
    report = read_report(context.output)
    assert report["total"]["kept"]["characters"] > 0.4 * MAX_MB * 1e6
    for source in report["sources"]:
        assert source["kept"]["documents"] > 0, source["uri"]


def test_a_second_time_gives_the_same_bytes_in_the_same_place(gathered):
    out, _ = gathered
    before = content_of(out)
    assert gather(out, PYTHONHASHSEED="1", SOMETHING="else").returncode == 0
    assert content_of(out) == before
    assert [p.name for p in out.parent.iterdir()] == ["raw"]


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    done = gather(tmp_path)
    assert done.returncode == 2
    assert f"--out: '{tmp_path}': exists and was not written by this command; name another folder" in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_docstrings_are_found_where_they_are():
    tree = ast.parse(
        '"""Module."""\nclass A:\n    """Class.\n\n    Indented.\n    """\n    def f(self):\n        """Method."""\n'
        "def g():\n    pass\nasync def h():\n    '''Coroutine \\ud800.'''\n"
    )
    found = [(f.name, f.content) for f in docstrings.docstrings_in(tree, name="m")]
    assert found == [("m", "Module."), ("m.A", "Class.\n\nIndented."), ("m.A.f", "Method."), ("m.h", "Coroutine .")]


def test_one_package_does_not_crowd_out_the_others(gathered):
    out, _ = gathered
    lines = [
        json.loads(line)
        for path in (out / "jsonl").iterdir()
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    sizes: dict[str, int] = {}
    for line in lines:
        package = line["name"].split(".")[0]
        sizes[package] = sizes.get(package, 0) + len(line["text"].encode())
    assert len(sizes) > 10
    assert max(sizes.values()) <= 0.55 * MAX_MB * 1e6 / 12


def test_items_are_taken_until_the_bound():
    items = [Found(name=str(i), content="é" * size) for i, size in enumerate((10, 100, 20, 19, 5))]
    assert [f.name for f in up_to(items, max_bytes=100)] == ["0", "2", "3"]


def test_pydoc_pages_have_a_main_text():
    rendered = dict(render_all(["textwrap", "no_such_module"]))
    assert {*rendered} == {"textwrap"}
    assert "Object for wrapping/filling text. The public interface consists of" in main_text(
        rendered["textwrap"].encode()
    )


def test_pydoc_pages_do_not_depend_on_the_process_and_hold_nothing_of_it(monkeypatch):
    pages_of = {}
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        monkeypatch.setenv("SECRET", f"hush-{seed}")
        pages_of[seed] = {found.name: found.content for found in pages.rendered_pages()}
    assert len(pages_of["1"]) > 150
    assert pages_of["1"] == pages_of["2"]
    hints = (b"SECRET", b"hush", b"PYTHONHASHSEED", sys.prefix.encode(), b"0x7f")
    assert [(name, hint) for name, page in pages_of["1"].items() for hint in hints if hint in page] == []


def test_help_topics_come_first_and_manual_pages_have_no_layout():
    found = list(up_to(manuals.find_manuals(), max_bytes=200_000))
    assert found[0].name == "topics/assert.txt"
    assert (
        manuals.without_layout("NAME\n     ls  -   list\n\n\n\n     Sort   entries\n")
        == "NAME\nls - list\n\nSort entries"
    )


def test_a_long_description_is_the_body_of_the_metadata():
    assert readmes.long_description("Name: x\nVersion: 1\n\n# Überschrift\n".encode()).strip() == "# Überschrift"


def test_a_broken_out_folder_is_a_user_error(tmp_path):
    from headrace_trainer.stages.corpus.machine_docs.__main__ import gather as gather_here

    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="name another folder"):
        gather_here(tmp_path / "file", max_mb=1)
