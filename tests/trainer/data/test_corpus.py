"""The corpus stage: what is dropped and why, duplicates, and equal bytes for equal input however it is read."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace_api.stages.corpus import Quality
from headrace_trainer.errors import Stopped, UserError
from headrace_trainer.formats.documents import read_documents, read_report
from headrace_trainer.stages.corpus import clean, run, stage
from headrace_trainer.stages.corpus.dedup import text_digest
from headrace_trainer.stages.corpus.funnel import Count, Funnel
from headrace_trainer.stages.corpus.language import identify, known_languages
from headrace_trainer.stages.corpus.quality import QualityJudge
from trainer.data.builders import corpus_config, html_page, make_context, prose, write_jsonl, write_warc, write_wet

GERMAN = (
    "Der Leuchtturm steht seit zweihundert Jahren am Rand der Klippe, und sein Licht ist weit über das Meer zu sehen. "
    "Wer nachts an der Küste entlanggeht, hört die Wellen und manchmal auch die Glocke des alten Hafens."
)
SHORT = "The weather was good and the sea was calm."
LONG_WORDS = "incomprehensibilities internationalization the counterrevolutionaries and uncharacteristically " * 12


def clean_corpus(folder, config):
    """The documents, the report and the metrics of a corpus stage."""
    context = make_context(folder, kind="corpus", config=config)
    metrics = run(context)
    return list(read_documents(context.output)), read_report(context.output), metrics


@pytest.mark.parametrize(
    ("text", "bounds", "rule"),
    [
        (prose(0), {}, None),
        (SHORT, {}, "minWords"),
        (prose(0), {"max_words": 60}, "maxWords"),
        ("a b c of to I is it at we " * 10, {}, "minMeanWordLength"),
        (LONG_WORDS, {}, "maxMeanWordLength"),
        (prose(0) + " # " * 20, {}, "maxSymbolToWordRatio"),
        (prose(0) + " and ... " * 30, {}, "maxSymbolToWordRatio"),
        ("\n".join(f"- {s}" for s in prose(0).split(". ")), {}, "maxBulletLineRatio"),
        ("\n".join(f"• {s}" for s in prose(0).split(". ")), {}, "maxBulletLineRatio"),
        ("\n".join(f"{s}..." for s in prose(0).split(". ")), {}, "maxEllipsisLineRatio"),
        (prose(0) + " 1234" * 60, {}, "minAlphabeticWordRatio"),
        ("Lighthouse keeper wrote weather report every morning, ships looked for it. " * 6, {}, "minStopWords"),
        (prose(0), {"min_words": 10_000, "rules": "none"}, None),
        (
            "- - -",
            {"min_words": 0, "min_stop_words": 0, "min_alphabetic_word_ratio": 0, "max_bullet_line_ratio": 1},
            None,
        ),
    ],
)
def test_a_text_is_dropped_by_the_first_rule_that_it_breaks(text, bounds, rule):
    assert QualityJudge(Quality(**bounds)).broken_rule(text, language="en") == rule


def test_english_stop_words_are_asked_of_english_alone():
    judge = QualityJudge(Quality(min_words=10))
    assert judge.broken_rule(GERMAN, language="de") is None
    assert judge.broken_rule(GERMAN, language="en") == "minStopWords"


def test_languages_are_identified_with_a_probability():
    for text, language in ((prose(0), "en"), (GERMAN, "de"), ("Le phare est sur la falaise depuis cent ans.", "fr")):
        code, probability = identify(text)
        assert code == language
        assert 0.65 < probability <= 1.0
    assert identify("7 + 5 = 12")[1] < 0.65
    assert {"en", "de", "zh"} <= {*known_languages()}


@pytest.mark.parametrize(
    ("other", "equal"),
    [
        ("THE CAFÉ\n\n  is open", True),
        ("The cafe\u0301 is open", True),
        ("The\u00a0café\tis open ", True),
        ("The cafe is open", False),
        ("The café is open.", False),
        ("Thecafé is open", False),
    ],
)
def test_texts_are_equal_but_for_case_white_space_and_unicode_form(other, equal):
    assert (text_digest("The café is open") == text_digest(other)) is equal


def test_the_funnel_says_which_source_lost_how_much_to_what(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", [prose(0), prose(1), f" {prose(0)}\n", GERMAN, SHORT, "", "12 + 7 = 19"])
    second = write_jsonl(tmp_path / "b.jsonl", [prose(2), prose(1), LONG_WORDS])
    documents, report, metrics = clean_corpus(tmp_path, corpus_config(first, second))
    assert [d.text for d in documents] == [prose(0), prose(1), prose(2)]
    dropped = [{r: c["documents"] for r, c in source["dropped"].items()} for source in report["sources"]]
    assert dropped == [
        {"noText": 1, "minLanguageScore": 1, "languages": 1, "minWords": 1, "dedup": 1},
        {"maxMeanWordLength": 1, "dedup": 1},
    ]
    assert [source["uri"] for source in report["sources"]] == [str(first), str(second)]
    assert report["total"]["read"]["documents"] == 10
    assert report["total"]["kept"] == {"documents": 3, "characters": sum(len(prose(i)) for i in range(3))}
    assert metrics == {
        "documentsIn": 10,
        "documentsOut": 3,
        "charactersOut": report["total"]["kept"]["characters"],
        "duplicates": 2,
    }


def test_the_funnel_is_printed_as_a_table(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [prose(0), prose(0), prose(1), "too short"])
    clean_corpus(tmp_path, corpus_config(path, languages=[], minLanguageScore=0))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == str(path)
    assert [line.split()[:4] for line in lines[2:]] == [
        ["read", "4", "100.0%", f"{2 * len(prose(0)) + len(prose(1)) + 9:,}"],
        ["-", "minWords", "1", "25.0%"],
        ["-", "dedup", "1", "25.0%"],
        ["kept", "2", "50.0%", f"{len(prose(0)) + len(prose(1)):,}"],
    ]


def test_every_document_is_in_the_funnel_once():
    funnel, rng = Funnel(), random.Random(0)
    for _ in range(100):
        funnel.read.add(10)
        if rng.random() < 0.5:
            funnel.drop(rng.choice(["noText", "dedup"]), 10)
    assert funnel.kept.plus(funnel.dropped["noText"]).plus(funnel.dropped["dedup"]) == Count(100, 1000)
    assert funnel.plus(funnel).kept == funnel.kept.plus(funnel.kept)


def test_a_document_knows_where_it_came_from(tmp_path):
    raw = tmp_path / "raw"
    write_jsonl(raw / "sub" / "a.jsonl", ["", prose(0)], url="https://harbour.example/a")
    (raw / "b.txt").write_text(prose(1))
    documents, _, _ = clean_corpus(tmp_path, corpus_config(raw))
    assert [(d.id, d.language, d.url, d.source) for d in documents] == [
        ("b.txt#1", "en", None, str(raw)),
        ("sub/a.jsonl#2", "en", "https://harbour.example/a", str(raw)),
    ]


def test_repeats_are_kept_on_request_and_every_language_if_none_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [prose(0), prose(0), GERMAN])
    documents, _, metrics = clean_corpus(tmp_path, corpus_config(path, dedup="none", languages=[]))
    assert [d.language for d in documents] == ["en", "en", "de"]
    assert metrics["duplicates"] == 0


def write_every_format(folder):
    """Two hundred documents of which 40 are repeats, in six formats."""
    texts = [prose(seed % 160, sentences=10) for seed in range(200)]
    write_jsonl(folder / "a.jsonl.gz", texts[:50])
    write_jsonl(folder / "b.jsonl", texts[50:100])
    pq.write_table(pa.table({"text": texts[100:140]}), folder / "c.parquet")
    write_warc(folder / "d.warc.gz", [("200 OK", "text/html", html_page(t)) for t in texts[140:150]])
    write_wet(folder / "e.warc.wet.gz", texts[150:190])
    for i, text in enumerate(texts[190:]):
        (folder / f"f{i}.txt").write_text(text)
    return folder


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_input_gives_the_same_bytes_from_one_process_and_from_two(tmp_path, monkeypatch):
    raw = write_every_format(tmp_path / "raw")
    results = []
    for name, cpus, unit_bytes in (("one", 1, 4 << 20), ("again", 1, 4 << 20), ("two", 2, 1)):
        monkeypatch.setattr(stage, "available_cpus", lambda cpus=cpus: cpus)
        monkeypatch.setattr(stage, "_PARALLEL_BYTES", 0)
        monkeypatch.setattr(clean, "_UNIT_BYTES", unit_bytes)
        context = make_context(tmp_path / name, kind="corpus", config=corpus_config(raw))
        assert run(context)["duplicates"] >= 30
        results.append(folder_bytes(context.output))
    assert results[0] == results[1] == results[2]
    assert {*results[0]} == {"documents-00000.jsonl.gz", "report.json"}


def test_a_broken_file_that_another_process_reads_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "available_cpus", lambda: 2)
    monkeypatch.setattr(stage, "_PARALLEL_BYTES", 0)
    monkeypatch.setattr(clean, "_UNIT_BYTES", 1)
    raw = tmp_path / "raw"
    for i in range(4):
        write_jsonl(raw / f"{i}.jsonl", [prose(i)])
    (raw / "2.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"2\.jsonl:1: not valid JSON"):
        clean_corpus(tmp_path, corpus_config(raw))


def test_sources_in_s3_give_the_same_documents(tmp_path, s3):
    client, storage = s3
    raw = write_every_format(tmp_path / "raw")
    for path in raw.iterdir():
        client.upload_file(str(path), "bucket", f"raw/{path.name}")
    local, _, _ = clean_corpus(tmp_path / "local", corpus_config(raw))
    context = make_context(tmp_path / "s3", kind="corpus", config=corpus_config("s3://bucket/raw"), storage=storage)
    run(context)
    remote = list(read_documents(context.output))
    assert [(d.id, d.text) for d in remote] == [(d.id, d.text) for d in local]
    assert not list((context.scratch / "parts").iterdir())


def test_large_corpora_are_cut_into_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("headrace_trainer.formats.documents._FILE_BYTES", 20_000)
    path = write_jsonl(tmp_path / "a.jsonl", [prose(seed) for seed in range(100)])
    documents, _, _ = clean_corpus(tmp_path, corpus_config(path))
    assert [d.text for d in documents] == [prose(seed) for seed in range(100)]
    files = sorted((tmp_path / "scratch-corpus" / "output").glob("documents-*"))
    assert len(files) > 3
    for file in files:
        assert json.loads(gzip.decompress(file.read_bytes()).splitlines()[0])["language"] == "en"


def test_files_without_documents_are_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match="the files hold no documents; check the addresses"):
        clean_corpus(tmp_path, corpus_config(tmp_path / "a.jsonl"))


def test_a_corpus_that_filters_to_nothing_says_which_field_dropped_how_many(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["short", "", *(GERMAN + str(i) for i in range(5)), prose(0)])
    with pytest.raises(UserError) as caught:
        clean_corpus(tmp_path, corpus_config(path, quality={"minWords": 1000}, minLanguageScore=0))
    assert str(caught.value) == (
        "corpus: no document is left: 8 documents read; languages dropped 6, noText dropped 1, minWords dropped 1; "
        "relax the field that dropped most, or add other sources"
    )


def test_a_language_that_cannot_be_identified_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"corpus.languages\[0\]: 'xx': cannot be identified; choose from .*en"):
        clean_corpus(tmp_path, corpus_config(tmp_path, languages=["xx"]))


def test_a_stage_that_is_asked_to_stop_leaves_no_result(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [prose(0)])
    context = make_context(tmp_path, kind="corpus", config=corpus_config(path))
    (context.scratch / "stop").touch()
    with pytest.raises(Stopped, match="before the corpus was complete"):
        run(context)
    assert not (context.output / "report.json").exists()
