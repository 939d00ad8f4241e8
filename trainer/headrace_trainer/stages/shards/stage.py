"""The shards stage: split, tokenize, write, count, describe.

In: a ``StageContext`` with a ``Shards`` block, a corpus and a tokenizer. Out, in ``ctx.output``: shards of both splits,
``manifest.json``, ``unigram.npy`` and a copy of the tokenizer.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from headrace_api.stages.shards import Shards
from headrace_trainer.artifacts import sha256_file
from headrace_trainer.errors import Stopped, UserError
from headrace_trainer.formats.documents import read_documents, read_report
from headrace_trainer.formats.shards.manifest import (
    TOKENIZER_FOLDER,
    UNIGRAM_FILE,
    Manifest,
    write_manifest,
)
from headrace_trainer.formats.shards.split import Split, split_of
from headrace_trainer.formats.tokenizer import (
    CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_FILE,
    LoadedTokenizer,
    load_tokenizer,
)
from headrace_trainer.stage import StageContext
from headrace_trainer.stages.shards.writer import ShardWriter

# Large enough to keep the tokenizer's threads busy, small enough to hold in memory along with its ids.
_BATCH_CHARACTERS = 4 << 20


@dataclass(kw_only=True)
class _Tally:
    """Counts of what was written so far."""

    unigram: NDArray[np.int64]
    documents: Counter[Split] = field(default_factory=Counter)
    tokens: Counter[Split] = field(default_factory=Counter)
    bytes: Counter[Split] = field(default_factory=Counter)

    def add(self, split: Split, text: str, ids: list[int]) -> None:
        self.documents[split] += 1
        self.tokens[split] += len(ids)
        self.bytes[split] += len(text.encode())
        if split is Split.TRAIN:
            np.add.at(self.unigram, ids, 1)


def run_shards(ctx: StageContext) -> dict[str, float]:
    """Tokenize the corpus.

    Returns:
        ``documentsIn``, ``tokensOut``, ``trainTokens``, ``validationTokens``, ``bytesPerToken``.

    Raises:
        UserError: one of the splits would be empty.
    """
    config = ctx.config
    assert isinstance(config, Shards)
    loaded = load_tokenizer(ctx.input("tokenizer"))
    dtype = token_dtype(loaded.vocab_size)
    writers = {s: ShardWriter(ctx.output, s, dtype=dtype, shard_bytes=config.shard_bytes) for s in Split}
    tally = _Tally(unigram=np.zeros(loaded.vocab_size, np.int64))
    _write(ctx, config, loaded, writers, tally)
    _check_both_splits(config, tally)
    _describe(ctx, loaded, dtype, writers, tally)
    return _metrics(tally)


def token_dtype(vocab_size: int) -> Literal["uint16", "int32"]:
    """The smallest Megatron dtype that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "int32"


def _write(
    ctx: StageContext, config: Shards, loaded: LoadedTokenizer, writers: dict[Split, ShardWriter], tally: _Tally
) -> None:
    corpus = ctx.input("corpus")
    total = read_report(corpus)["total"]["kept"]["documents"]
    texts = (document.text for document in read_documents(corpus))
    for text, ids in _tokenize(texts, loaded):
        split = split_of(text, validation_ratio=config.validation_ratio)
        writers[split].write(ids)
        tally.add(split, text, ids)
        done = tally.documents.total()
        if done % 1000 == 0:
            ctx.report(phase="Running", done=done, total=total, unit="documents")
            if ctx.stop_requested():
                raise Stopped("stopped before the shards were complete; the next attempt starts over")
    for writer in writers.values():
        writer.close()


def _tokenize(texts: Iterable[str], loaded: LoadedTokenizer) -> Iterator[tuple[str, list[int]]]:
    """Each text with its ids, ending in the end-of-document id."""
    # Text that quotes a special token must not end a document early.
    loaded.tokenizer.encode_special_tokens = True
    for batch in _batches(texts):
        encoded = loaded.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for text, encoding in zip(batch, encoded, strict=True):
            yield text, [*encoding.ids, loaded.eod_id]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_both_splits(config: Shards, tally: _Tally) -> None:
    for split, remedy in ((Split.TRAIN, "lower"), (Split.VALIDATION, "raise")):
        if not tally.documents[split]:
            raise UserError(
                f"shards.validationRatio: {config.validation_ratio}: none of {tally.documents.total()} documents "
                f"is for {'training' if split is Split.TRAIN else split}; {remedy} it, or give the corpus stage more text"
            )


def _describe(
    ctx: StageContext,
    loaded: LoadedTokenizer,
    dtype: Literal["uint16", "int32"],
    writers: dict[Split, ShardWriter],
    tally: _Tally,
) -> None:
    """Write the tokenizer, the unigram counts and the manifest beside the shards."""
    _copy_tokenizer(ctx.input("tokenizer"), ctx.output / TOKENIZER_FOLDER)
    np.save(ctx.output / UNIGRAM_FILE, tally.unigram)
    manifest = Manifest(
        dtype=dtype,
        vocab_size=loaded.vocab_size,
        eod_id=loaded.eod_id,
        tokens={s: tally.tokens[s] for s in Split},
        documents={s: tally.documents[s] for s in Split},
        bytes={s: tally.bytes[s] for s in Split},
        shards=[shard for split in Split for shard in writers[split].shards],
        tokenizer_sha256=sha256_file(ctx.output / TOKENIZER_FOLDER / TOKENIZER_FILE),
    )
    write_manifest(ctx.output, manifest)


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir()
    for name in (TOKENIZER_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE):
        shutil.copyfile(source / name, target / name)


def _metrics(tally: _Tally) -> dict[str, float]:
    return {
        "documentsIn": tally.documents.total(),
        "tokensOut": tally.tokens.total(),
        "trainTokens": tally.tokens[Split.TRAIN],
        "validationTokens": tally.tokens[Split.VALIDATION],
        "bytesPerToken": tally.bytes.total() / tally.tokens.total(),
    }
