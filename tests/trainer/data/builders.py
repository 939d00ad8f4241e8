"""Builders: prose that passes the rules, stage contexts, a chain of the three data stages, and archives with real records."""

import gzip
import io
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from headrace_api.artifact import ArtifactRef, stage_hash
from headrace_api.contract import ResolvedStage
from headrace_api.run import Stage, Storage
from headrace_trainer.stage import StageContext, run_stage

SENTENCES = (
    "The keeper of the lighthouse wrote down the weather every morning and sent the page to the harbour.",
    "Ships that have lost their way look for the lamp, and the lamp has to burn until the sun is up.",
    "In winter the sea is grey and the boats stay in the port with their nets folded on the deck.",
    "A good map shows the depth of the water, the rocks that lie under it, and the way to the beach.",
    "Nobody in the village could remember a storm that had lasted for more than three days and nights.",
    "The children of the baker walk along the wall to school, and they count the gulls that sit on it.",
    "When the fog comes in from the west, the old horn is sounded twice in every minute of the night.",
    "She told the captain that the oil would last for a week, and that they should buy more in the town.",
)


def prose(seed: int, *, sentences: int = 6) -> str:
    """English that every rule keeps; another seed gives another text."""
    chosen = random.Random(seed).choices(SENTENCES, k=sentences)
    return f"Entry {seed} of the log. " + " ".join(chosen)


def make_context(folder: Path, *, kind: str, config: dict[str, Any], **options: Any) -> StageContext:
    """A context with the real classes.

    Args:
        folder: scratch, and storage unless ``storage`` is given.
        kind: the stage kind; also the stage's name unless ``name`` is given.
        config: the typed block as in a manifest.
        options: ``name``, ``storage``, ``inputs``.
    """
    name = options.get("name", kind)
    stage = Stage.model_validate({"name": name, kind: config})
    storage = options.get("storage") or Storage(uri=str(folder / "storage"))
    inputs: dict[str, ArtifactRef] = options.get("inputs", {})
    resolved = ResolvedStage(
        run="test",
        stage=stage,
        attempt=1,
        seed=7,
        hash=stage_hash(stage.config, seed=7, inputs={slot: ref.digest for slot, ref in inputs.items()}),
        inputs=inputs,
        storage=storage,
        output_uri=f"{storage.uri}/{name}",
    )
    return StageContext(resolved=resolved, scratch=folder / f"scratch-{name}")


def finish(context: StageContext) -> ArtifactRef:
    """Run the stage, commit its artifact, and refer to it."""
    outcome = run_stage(context)
    assert outcome.artifact_digest is not None
    return ArtifactRef(uri=context.resolved.output_uri, digest=outcome.artifact_digest, kind=context.config.GIVES)


def corpus_config(*uris: Path | str, **fields: Any) -> dict[str, Any]:
    """A corpus block over ``uris`` that keeps English prose of 20 words or more."""
    quality = {"minWords": 20} | fields.pop("quality", {})
    return {"sources": [{"uri": str(uri)} for uri in uris], "languages": ["en"], "quality": quality} | fields


def write_jsonl(path: Path, texts: Iterable[str], **fields: Any) -> Path:
    """One object a text; compressed where the name ends in .gz."""
    lines = "".join(json.dumps({"text": text} | fields) + "\n" for text in texts).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)
    return path


def html_page(text: str) -> bytes:
    """A page with ``text`` as its article, between a menu and a footer."""
    body = "".join(f"<p>{part}</p>" for part in text.split("\n"))
    return (
        "<!doctype html><html><head><meta charset='utf-8'><title>Log</title></head><body>"
        "<nav><ul><li><a href='/'>Home</a></li><li><a href='/about'>About us</a></li></ul></nav>"
        f"<main><article><h1>The log of the lighthouse</h1>{body}</article></main>"
        "<footer>Copyright and imprint</footer></body></html>"
    ).encode()


def write_warc(path: Path, pages: Sequence[tuple[str, str, bytes]]) -> Path:
    """A WARC file of (status line, content type, body), one response each, between a warcinfo and a request record."""
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=path.suffix == ".gz")
        writer.write_record(writer.create_warcinfo_record(path.name, {"software": "test"}))
        for i, (status, content_type, body) in enumerate(pages):
            headers = StatusAndHeaders(status, [("Content-Type", content_type)], protocol="HTTP/1.1")
            writer.write_record(
                writer.create_warc_record(
                    f"https://harbour.example/{i}", "response", payload=io.BytesIO(body), http_headers=headers
                )
            )
    return path


def write_wet(path: Path, texts: Sequence[str]) -> Path:
    """A WET file as Common Crawl makes them: conversion records of plain text."""
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=path.suffix == ".gz")
        for i, text in enumerate(texts):
            record = writer.create_warc_record(
                f"https://harbour.example/{i}",
                "conversion",
                payload=io.BytesIO(text.encode()),
                warc_content_type="text/plain",
            )
            writer.write_record(record)
    return path
