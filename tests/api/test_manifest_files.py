"""Files that are not manifests, or damaged ones: one clear line each, never a traceback or a hang."""

import errno
import os
import re
import time

import pytest
import yaml

from builders import manifest
from headrace_api import plain_yaml
from headrace_api.base import FieldError
from headrace_api.errors import MAX_BYTES, ManifestError, load_run
from headrace_api.plain_yaml import MAX_DEPTH, MAX_NODES, dotted, read_documents, resolve, shown
from manifests import PLAIN_SCALARS

GOOD = yaml.safe_dump(manifest("corpus"))


def _refusal(tmp_path, content: bytes) -> str:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ManifestError) as refused:
        load_run(path)
    (problem,) = refused.value.problems
    return problem.removeprefix(f"{path}: ")


def _with(scalar: str, *, field: str = "seed") -> bytes:
    return GOOD.replace("spec:\n", f"spec:\n  {field}: {scalar}\n").encode()


def _bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    return "\n".join(lines)


NO_MANIFESTS = [
    (b"", "holds nothing: add an object with kind: TrainingRun"),
    (b"---\n---\n# nothing\n", "holds nothing"),
    (b"kind: Pod", "holds 'Pod': add an object with kind: TrainingRun"),
    (b"- a\n- b\n", "a list: write a block with apiVersion, kind, metadata and spec"),
    (b"just text", "'just text': write a block with"),
    (b"a: [", "line 2, column 1: did not find expected node content: correct the YAML there"),
    (b"a:\n\tb: 1", "line 2, column 1: a tab: YAML is indented with spaces"),
    (b"a:\n  \tb: 1", "line 2, column 3: a tab: YAML is indented with spaces"),
    (b"a: @\tx", "line 1, column 4: found character that cannot start any token: correct the YAML there"),
    (b"kind: Pod\n---\nkind: Secret", "holds 'Pod', 'Secret': add an object with kind: TrainingRun"),
    (b"kind: TrainingJob", "holds 'TrainingJob': add an object with kind: TrainingRun"),
    (b"kind: TrainingRuntim", "holds 'TrainingRuntim': add an object with kind: TrainingRun"),
    (b"\xff\xfe\x00", "byte 0 is not UTF-8: save the file as UTF-8 text"),
    (b"a: 1\nb: \x00", "line 2: a control character: YAML is text"),
    (b"\na: 1\nb: \x00\nc: 1\n", "line 3: a control character"),
    ("a: \u00e9\u00e9\u00e9\u00e9\nb: \x00\n\n\n\n".encode(), "line 2: a control character"),
    (b"[" * 20_000, f"line 1: nested more than {MAX_DEPTH} deep: nest less; is a bracket left open?"),
    (b"- " * 20_000, f"line 1: nested more than {MAX_DEPTH} deep"),
    (_bomb().encode(), f"line 5, a4[7]: more than {MAX_NODES} values: write fewer; aliases count each time"),
    (b"a: &a [*a]", "line 1, a[0]: *a: no earlier block is marked &a"),
    (b"a: &a\n  <<: *a", "line 2, a.<<: *a: no earlier block is marked &a"),
    (b"spec:\n  seed: 1\n  runtime: x\n  seed: 2", "line 4, spec.seed: duplicate key: already set on line 2"),
    (b"a: 1\n'a': 2", "line 2, a: duplicate key: already set on line 1; remove one of them"),
    (b"x: !!python/object/apply:os.system [reboot]", "line 1, x: tag:yaml.org,2002:python/object/apply:os.system: tags have"),
    (b"x:\n  z: !!int '3'", "line 2, x.z: tag:yaml.org,2002:int: tags have no effect here; remove it"),
    (b"a: &a 1\nb:\n  <<: *a", "line 3, b.<<: 1: << merges blocks; give it an alias of one"),
    (b"a: &a {x: 1}\nb:\n  <<: [*a, 2]", "line 3, b.<<: a list: << merges blocks; give it an alias of one"),
    (b"x: 1." + b"0" * 45, "line 1, x: a number of 47 digits: write at most 40"),
    (b"? [a]\n: b", "line 1: a list: a key is one word; write name: value"),
    (b'a: "\\ud800"', "line 1, column 7: found invalid Unicode character escape code"),
    (b"x" * (MAX_BYTES + 1), f"{MAX_BYTES + 1} bytes: a manifest has at most {MAX_BYTES}"),
    (b"x: " + b"9" * 5000, "line 1, x: a number of 5000 digits: write at most 40"),
    (f"{GOOD}---\n{GOOD}".encode(), "2 TrainingRun objects: keep one"),
    (GOOD.replace("TrainingRun", "TrainingRum").encode(), "kind: 'TrainingRum': did you mean TrainingRun?"),
    (GOOD.replace("kind: TrainingRun", "").encode(), "kind: missing; this field is required"),
    (GOOD.replace("v1alpha1", "v1").encode(), "apiVersion: 'headrace.dev/v1': did you mean headrace.dev/v1alpha1?"),
    (_with("2024-13-45"), "spec.seed: '2024-13-45': write a whole number, without quotes"),
    (_with("2024-01-01"), "spec.seed: '2024-01-01': write a whole number, without quotes"),
    (_with("12:30"), "spec.seed: '12:30': write a whole number, without quotes"),
    (_with(".inf"), "spec.seed: inf: write a finite number"),
    (_with("-.nan"), "spec.seed: '-.nan': write a whole number"),
    (_with(".nan"), "spec.seed: nan: write a finite number"),
    (_with("1e400"), "spec.seed: '1e400': write a whole number"),
    (_with("yes"), "spec.seed: true: write a whole number, without quotes"),
    (_with("1.5"), "spec.seed: 1.5: write a whole number"),
    (_with("-1"), "spec.seed: -1: must be at least 0"),
    (_with("99999999999999999999"), "spec.seed: 99999999999999999999: must be at most 2147483647"),
    (_with("on", field="runtime"), "spec.runtime: true: write text, in quotes: YAML reads yes, no, on, off, y and n as true"),
    (_with("1", field="runtime"), "spec.runtime: 1: write text, in quotes"),
    (_with("1", field="~"), "spec.null: unknown field"),
    (_with("1", field="yes"), "spec.true: unknown field"),
    (_with("1", field="16"), "spec.16: unknown field"),
    (_with("maybe", field="suspend"), "spec.suspend: 'maybe': write true or false, without quotes"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), NO_MANIFESTS, ids=[expected[:60] for _, expected in NO_MANIFESTS])
def test_a_file_that_is_no_manifest_says_why(tmp_path, content, expected):
    assert _refusal(tmp_path, content).startswith(expected)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: None, "no such file: check the path"),
        (lambda p: p.mkdir(), "a folder: name a YAML file"),
        (lambda p: os.mkfifo(p), "not an ordinary file: name a YAML file"),
    ],
    ids=["none", "folder", "fifo"],
)
def test_what_is_no_file_is_refused_at_once(tmp_path, make, said):
    path = tmp_path / "run.yaml"
    make(path)
    with pytest.raises(ManifestError) as refused:
        load_run(path)
    assert str(refused.value) == f"{path}: {said}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a\0b", "embedded null (byte|character.*)"),
        ("x" * 300, os.strerror(errno.ENAMETOOLONG)),
        ("run.yaml/x", os.strerror(errno.ENOTDIR)),
    ],
    ids=["with a NUL", "too long", "below a file"],
)
def test_a_path_that_no_file_can_have_is_refused(tmp_path, name, said):
    (tmp_path / "run.yaml").write_text(GOOD)
    with pytest.raises(ManifestError) as refused:
        load_run(tmp_path / name)
    problem = str(refused.value).removeprefix(f"{tmp_path / name}: ")
    assert re.fullmatch(f"cannot be read: {said}: check the path and its permissions", problem)


def test_a_manifest_of_the_largest_size_is_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "#".ljust(MAX_BYTES - len(GOOD), "x"))
    assert path.stat().st_size == MAX_BYTES
    assert load_run(path).metadata.name == "demo"


def test_other_objects_in_the_file_are_left_alone_and_so_is_a_status(tmp_path):
    path = tmp_path / "run.yaml"
    exported = manifest() | {"status": {"summary": "Complete", "ofANewerVersion": 1}}
    exported["metadata"] |= {"labels": {"team": "a"}, "managedFields": [{}], "uid": "u", "resourceVersion": "7"}
    path.write_text(yaml.safe_dump_all([{"kind": "Secret"}, exported, None, {"kind": "ConfigMap"}]))
    run = load_run(path)
    assert (run.metadata.name, run.status.summary) == ("demo", None)


def test_a_block_that_is_written_once_and_used_twice_is_read(tmp_path):
    path = tmp_path / "run.yaml"
    shared = "    compute: &small\n      nodes: 1\n      memory: 4Gi\n"
    text = yaml.safe_dump(manifest("corpus", "tok"), sort_keys=False)
    text = text.replace("  - name: corpus\n", f"  - name: corpus\n{shared}")
    path.write_text(
        text.replace("  - name: tok\n", "  - name: tok\n    compute:\n      <<: *small\n      memory: 1Gi\n")
    )
    corpus, tok = load_run(path).spec.stages
    assert (corpus.compute.memory, tok.compute.memory, tok.compute.nodes) == (4 * 2**30, 2**30, 1)


def test_a_number_with_decimals_and_a_suffix_is_exact(tmp_path):
    path = tmp_path / "run.yaml"
    for written, tokens in (("2.05M", 2_050_000), ("0.29G", 290_000_000), ("3e6", 3_000_000), ("2_000_000", 2_000_000)):
        path.write_text(yaml.safe_dump(manifest()).replace("tokens: 1M", f"tokens: {written}"))
        pretrain = load_run(path).spec.stages[3].pretrain
        assert pretrain is not None and pretrain.tokens == tokens


def test_numbers_that_other_readers_of_yaml_take_for_text_are_numbers(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(manifest()).replace("tokens: 1M", "tokens: 1M\n      schedule: {learningRate: 3e-4}")
    )
    pretrain = load_run(path).spec.stages[3].pretrain
    assert pretrain is not None and pretrain.schedule.learning_rate == 3e-4


READ = [
    ("a: '5'\nb: \"no\"\nc: |-\n  7\n", {"a": "5", "b": "no", "c": "7"}),
    ("a: !!str 5\nb: ! 6", {"a": "5", "b": "6"}),
    ("a: &a 1\nb: *a", {"a": 1, "b": 1}),
    ("a: &a {x: 1}\nb: &b {x: 2, w: 2}\nc: {z: 3, <<: [*a, *b]}", {"a": {"x": 1}, "b": {"x": 2, "w": 2}, "c": {"x": 1, "w": 2, "z": 3}}),
    ("9" * 40, int("9" * 40)),
    ("a" * 50, "a" * 50),
]  # fmt: skip


@pytest.mark.parametrize(("text", "meant"), READ, ids=[text[:40].replace("\n", "; ") for text, _ in READ])
def test_quotes_tags_and_aliases_mean_what_they_mean_to_kubectl(text, meant):
    assert read_documents(text) == [meant]


def test_a_file_is_as_deep_as_it_may_be_and_no_deeper():
    assert len(read_documents("[" * MAX_DEPTH + "]" * MAX_DEPTH)) == 1
    with pytest.raises(FieldError, match="nested more than"):
        read_documents("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


@pytest.mark.parametrize("one_more", ["x", "[]", "*one"])
def test_a_file_holds_as_many_values_as_it_may_and_no_more(one_more):
    """The list, a thousand values, 98 copies of them, and 999 more: a hundred thousand."""
    thousand = "- &all [&one x" + ", x" * 997 + ", *one]\n"
    text = thousand + "- *all\n" * 98 + "- *one\n" * 998
    (read,) = read_documents(text + "- x\n")
    assert 1 + sum(1 + len(item) if isinstance(item, list) else 1 for item in read) == MAX_NODES
    with pytest.raises(FieldError) as refused:
        read_documents(f"{text}- x\n- {one_more}\n")
    assert refused.value.field.startswith("line 1099, [1098]")


@pytest.mark.parametrize("half", ["d800", "dbff", "dc00", "dfff"])
def test_half_a_surrogate_pair_is_refused_by_the_slower_reader_too(tmp_path, monkeypatch, half):
    monkeypatch.setattr(plain_yaml, "_LOADER", yaml.SafeLoader)
    said = f"line 1, a: '\\u{half}': contains half of a surrogate pair; write the character itself"
    assert _refusal(tmp_path, f'a: "\\u{half}"'.encode()) == said


LONG = "a" * 60
DOTTED = [
    (["spec", "stages", 1, "name"], "spec.stages[1].name"),
    ([LONG], LONG),
    (["spec", LONG + "a"], f"spec.'{'a' * 59}"),
    (["spec", ""], "spec.''"),
    (["a\nb"], "'a\\nb'"),
]


@pytest.mark.parametrize(("parts", "path"), DOTTED, ids=range(len(DOTTED)))
def test_a_path_is_on_one_line_whatever_its_names_are(parts, path):
    assert dotted(parts) == path


@pytest.mark.parametrize(("length", "said"), [(78, f"'{'a' * 78}'"), (79, f"'{'a' * 76}...")])
def test_a_value_is_shown_in_eighty_characters(length, said):
    assert shown("a" * length) == said


@pytest.mark.parametrize(("text", "meant"), PLAIN_SCALARS)
def test_scalars_mean_what_they_mean_to_kubectl(text, meant):
    assert resolve(text) == meant and type(resolve(text)) is type(meant)


def test_the_largest_file_that_is_read_takes_no_longer_than_its_size(tmp_path):
    """Twice the file, about twice the time: nothing in the reader is quadratic."""

    def seconds(lines: int) -> float:
        path = tmp_path / f"{lines}.yaml"
        path.write_text("kind: Pod\n---\n" + "".join(f"key{i}: {{a: [1, 2]}}\n" for i in range(lines)))
        started = time.process_time()
        with pytest.raises(ManifestError):
            load_run(path)
        return time.process_time() - started

    seconds(100)
    assert seconds(16_000) < 8 * seconds(4_000)
