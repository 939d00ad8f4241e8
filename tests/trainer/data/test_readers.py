"""Every format is read; every kind of damage is an error that names the place and the remedy."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace_api.run import Storage
from headrace_api.stages.corpus import Format, Source
from headrace_trainer.errors import UserError
from headrace_trainer.formats.files import local_copy
from headrace_trainer.stages.corpus.readers import read_records
from headrace_trainer.stages.corpus.sources import find_files, format_of
from trainer.data.builders import html_page, prose, write_jsonl, write_warc, write_wet

HTML = "text/html; charset=utf-8"


def read(path, **source):
    """The records of a source, as the corpus stage finds and reads them."""
    files = find_files([Source(uri=str(path), **source)], Storage())
    return [record for file in files for record in read_records(path if path.is_file() else path / file.key, file)]


def texts(path, **source):
    return [record.text for record in read(path, **source)]


def failure(path, **source):
    with pytest.raises(UserError) as caught:
        read(path, **source)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CC-MAIN-0001.warc.gz", Format.WARC),
        ("a.warc", Format.WARC),
        ("CC-MAIN-0001.warc.wet.gz", Format.WET),
        ("a.wet.gz", Format.WET),
        ("a.jsonl", Format.JSONL),
        ("c4-train.00000-of-01024.json.gz", Format.JSONL),
        ("a.jsonl.zst", Format.JSONL),
        ("part-0.snappy.parquet", Format.PARQUET),
        ("INDEX.HTML", Format.HTML),
        ("a.htm", Format.HTML),
        ("a.txt", Format.TEXT),
        ("README.md", Format.TEXT),
        ("README", Format.TEXT),
        ("notes.txt.gz", Format.TEXT),
        ("v1.2.jsonl/README", Format.TEXT),
    ],
)
def test_the_name_of_a_file_says_how_it_is_read(name, expected):
    assert format_of(name) is expected


COMPRESSORS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_jsonl_is_read_from_every_compression(tmp_path, suffix):
    wanted = [prose(seed) for seed in range(50)]
    lines = write_jsonl(tmp_path / "plain.jsonl", wanted, url="https://harbour.example/").read_bytes()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSORS[suffix](lines))
    records = read(path)
    assert [r.text for r in records] == wanted
    assert [r.number for r in records] == list(range(1, 51))
    assert {r.url for r in records} == {"https://harbour.example/"}


@pytest.mark.parametrize("suffix", [s for s in COMPRESSORS if s])
def test_a_compressed_file_that_was_cut_short_is_named(tmp_path, suffix):
    lines = write_jsonl(tmp_path / "plain.jsonl", (prose(seed) for seed in range(50))).read_bytes()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSORS[suffix](lines)[:-20])
    assert f"{path}: truncated or corrupt near byte" in failure(path)
    assert "copy the file again" in failure(path)


def test_a_compressed_file_with_a_flipped_bit_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl.gz", (prose(seed) for seed in range(50)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert str(path) in failure(path)


def test_the_text_is_taken_from_the_named_field(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one", "text": "no"}\n\n{"body": null}\n')
    assert texts(path, textField="body") == ["one", ""]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "no end"', ":2: not valid JSON"),
        (b'{"body": "x", "title": "y"}', ":2: no field 'text'; this line has body, title: set the source's textField"),
        (b'{"text": 7}', ":2: field 'text' holds int, not text"),
        (b'["text"]', ":2: a JSON list, not an object"),
        (b'{"text": "gr\xfc\xdfe"}', ":2: byte 29 is not valid UTF-8"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    assert f"{path}{expected}" in failure(path)


def test_parquet_gives_one_record_a_row(tmp_path):
    path = tmp_path / "a.parquet"
    rows = {"content": ["one", None, "three"], "url": ["https://a.example", None, None], "n": [1, 2, 3]}
    pq.write_table(pa.table(rows), path)
    records = read(path, textField="content")
    assert [(r.text, r.url) for r in records] == [("one", "https://a.example"), ("", None), ("three", None)]


def test_parquet_columns_of_dictionaries_and_long_strings_are_texts_too(tmp_path):
    for i, column in enumerate((pa.array(["a", "a"]).dictionary_encode(), pa.array(["a", "a"], pa.large_string()))):
        pq.write_table(pa.table({"text": column}), tmp_path / f"{i}.parquet")
    assert texts(tmp_path) == ["a"] * 4


def test_a_missing_parquet_column_is_answered_with_those_that_are_there(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), path)
    assert f"{path}: no column 'text'; the file has body, id: set the source's textField" in failure(path)
    assert f"{path}: column 'id' holds int64, not text" in failure(path, textField="id")


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-30], lambda d: b"no parquet", lambda d: b"", lambda d: d[:8] + b"x" * 40 + d[48:]]
)
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [prose(seed) for seed in range(20)]}), path)
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path}: cannot be read as Parquet" in failure(path)


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_a_warc_file_gives_the_main_text_of_its_pages(tmp_path, name):
    wanted = [prose(seed, sentences=10) for seed in range(3)]
    pages = [("200 OK", HTML, html_page(text)) for text in wanted]
    pages.insert(1, ("404 Not Found", HTML, html_page("gone")))
    pages.insert(2, ("200 OK", "image/png", b"\x89PNG"))
    records = read(write_warc(tmp_path / name, pages))
    assert [r.url for r in records] == [f"https://harbour.example/{i}" for i in (0, 3, 4)]
    for record, text in zip(records, wanted, strict=True):
        assert text in record.text
        assert "Copyright and imprint" not in record.text
        assert "About us" not in record.text


def test_pages_in_other_encodings_are_decoded(tmp_path):
    text = "Die Möwen über dem Hafen rufen, und die Fischer flicken früh am Morgen ihre grünen Netze. " * 5
    page = html_page(text).decode().replace("utf-8", "iso-8859-1").encode("iso-8859-1")
    (record,) = read(write_warc(tmp_path / "a.warc", [("200 OK", "text/html; charset=iso-8859-1", page)]))
    assert "Die Möwen über dem Hafen" in record.text


def test_a_wet_file_gives_its_texts(tmp_path):
    wanted = [prose(0), "Grüße aus dem Hafen"]
    assert texts(write_wet(tmp_path / "a.warc.wet.gz", wanted)) == wanted


def _cut_points(content):
    """Places in an archive's last record: in its page, at the page's last byte, in its HTTP and in its WARC header."""
    last = content.rindex(b"WARC/1.0")
    body = content.index(b"<!doctype", last)
    return {"page": body + 100, "last byte": len(content) - 5, "http header": body - 10, "warc header": last + 40}


@pytest.mark.parametrize("place", ["page", "last byte", "http header", "warc header"])
def test_a_warc_file_that_was_cut_short_is_named_with_the_record_and_the_byte(tmp_path, place):
    path = write_warc(tmp_path / "a.warc", [("200 OK", HTML, html_page(prose(seed))) for seed in range(3)])
    content = path.read_bytes()
    path.write_bytes(content[: _cut_points(content)[place]])
    message = failure(path)
    assert f"{path}: record 4, at byte {content.rindex(b'WARC/1.0')} of the decompressed file" in message
    assert "truncated" in message


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_a_compressed_warc_file_that_was_cut_short_is_named_with_the_byte(tmp_path, kept):
    path = write_warc(tmp_path / "a.warc.gz", [("200 OK", HTML, html_page(prose(seed))) for seed in range(20)])
    size = int(path.stat().st_size * kept)
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path}: truncated or corrupt near byte {size}" in failure(path)


def test_a_file_that_is_no_archive_is_named(tmp_path):
    path = tmp_path / "a.warc"
    path.write_text("just text\n" * 20)
    assert f"{path}: record 1, at byte 0" in failure(path)
    assert "not a WARC file" in failure(path)


def test_text_and_html_files_are_one_document_each(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + prose(0).encode())
    (tmp_path / "b.html").write_bytes(html_page(prose(1, sentences=10)))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.md").write_text(prose(2))
    (tmp_path / "_SUCCESS").write_text("marker")
    (tmp_path / ".DS_Store").write_bytes(b"\0\xff")
    found = texts(tmp_path)
    assert [found[0], found[2]] == [prose(0), prose(2)]
    assert prose(1, sentences=10) in found[1]
    assert len(found) == 3


def test_text_that_is_not_utf8_is_named_with_line_and_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"first line\nsecond gr\xfc\xdfe\n")
    assert f"{path}:2: byte 20 is not valid UTF-8" in failure(path)
    assert "iconv" in failure(path)


def test_a_format_in_the_manifest_overrides_the_name(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(json.dumps({"text": "one"}) + "\n")
    assert texts(path, format="jsonl") == ["one"]


@pytest.mark.parametrize("name", ["missing", "missing.txt", "missing/a.txt"])
def test_a_source_that_is_not_there_is_named_by_its_field(tmp_path, name):
    (tmp_path / "other.txt").write_text("x")
    message = failure(tmp_path / name)
    assert f"corpus.sources[0].uri: '{tmp_path / name}': no file, and no folder with files" in message


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "raw").mkdir()
    assert "no file, and no folder with files" in failure(tmp_path / "raw")


def test_files_in_s3_are_found_by_prefix_and_by_key(tmp_path, s3):
    client, storage = s3
    for name in ("raw/b.txt", "raw/a.txt", "raw2/c.txt"):
        client.put_object(Bucket="bucket", Key=name, Body=name.encode())
    sources = [Source(uri="s3://bucket/raw"), Source(uri="s3://bucket/raw2/c.txt"), Source(uri="s3://bucket/raw/")]
    files = find_files(sources, storage)
    assert [f.address for f in files[:3]] == [
        "s3://bucket/raw/a.txt",
        "s3://bucket/raw/b.txt",
        "s3://bucket/raw2/c.txt",
    ]
    assert [f.source for f in files] == [0, 0, 1, 2, 2]
    with local_copy(files[0], storage, scratch=tmp_path) as path:
        assert [r.text for r in read_records(path, files[0])] == ["raw/a.txt"]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="s3://bucket/none"):
        find_files([Source(uri="s3://bucket/none")], storage)
