"""The tokenizer stage: train or import, save, measure.

In: a ``StageContext`` with a ``Tokenizer`` block. Out: the tokenizer's files in ``ctx.output``.
"""

from itertools import islice
from pathlib import Path

from headrace_api.stages.tokenizer import Tokenizer as TokenizerSpec
from headrace_api.stages.tokenizer import TokenizerImport
from headrace_trainer.formats.documents import read_documents, read_report
from headrace_trainer.formats.tokenizer import END_OF_TEXT, LoadedTokenizer, load_tokenizer, save_tokenizer
from headrace_trainer.stage import StageContext
from headrace_trainer.stages.tokenizer.importing import WANTED, import_tokenizer
from headrace_trainer.stages.tokenizer.train import sample_texts, train_bpe
from headrace_trainer.storage import open_uri

_MEASURED_DOCUMENTS = 1_000


def run_tokenizer(ctx: StageContext) -> dict[str, float]:
    """Train or import.

    Returns:
        ``vocabSize``; after training also ``bytesPerToken``, on the first thousand documents.

    Raises:
        UserError: the corpus is too small for the vocabulary, or the imported files cannot be read.
    """
    config = ctx.config
    assert isinstance(config, TokenizerSpec)
    if config.import_ is not None:
        _import(ctx, config.import_)
        return {"vocabSize": load_tokenizer(ctx.output).vocab_size}
    corpus = ctx.input("corpus")
    _train(ctx, config, corpus)
    loaded = load_tokenizer(ctx.output)
    return {"vocabSize": loaded.vocab_size, "bytesPerToken": _bytes_per_token(loaded, corpus)}


def _train(ctx: StageContext, config: TokenizerSpec, corpus: Path) -> None:
    ctx.report(phase="Running", total=config.vocab_size, unit="tokens", message="learning merges")
    # A text has at least as many bytes as characters, so this sample is never smaller than sampleBytes allows.
    characters = read_report(corpus)["total"]["kept"]["characters"]
    part = min(1.0, config.sample_bytes / characters)
    texts = sample_texts(read_documents(corpus), part=part, max_bytes=config.sample_bytes)
    save_tokenizer(train_bpe(texts, vocab_size=config.vocab_size), ctx.output, eod=END_OF_TEXT)


def _import(ctx: StageContext, source: TokenizerImport) -> None:
    folder = ctx.scratch / "import"
    folder.mkdir(parents=True, exist_ok=True)
    store = open_uri(source.uri, ctx.resolved.storage)
    for name in WANTED:
        if store.exists(name):
            store.get_file(name, folder / name)
    imported = import_tokenizer(folder, uri=source.uri)
    save_tokenizer(imported.tokenizer, ctx.output, eod=imported.eod, config=imported.config)


def _bytes_per_token(loaded: LoadedTokenizer, corpus: Path) -> float:
    texts = [document.text for document in islice(read_documents(corpus), _MEASURED_DOCUMENTS)]
    tokens = sum(len(e.ids) for e in loaded.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    return sum(len(text.encode()) for text in texts) / tokens
