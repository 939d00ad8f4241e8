"""Tokenizers of each kind that behaves in its own way at the beginning of a text, as artifacts; and files of records."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from headrace_trainer.formats.tokenizer import END_OF_TEXT, save_tokenizer
from headrace_trainer.stages.tokenizer.train import train_bpe
from trainer.data.builders import prose

TEXTS = [
    *(prose(seed) for seed in range(60)),
    *(f"user\nassistant\nsystem\n\nWhat is {i} + {i}?\n\n{2 * i}" for i in range(60)),
]


def byte_level() -> Tokenizer:
    """As GPT-2 and Qwen: bytes, nothing added at the beginning."""
    return train_bpe(TEXTS, vocab_size=420)


def with_beginning() -> Tokenizer:
    """As Llama 3: bytes, and a token before every text that is tokenized with special tokens."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def _sentence_pieces(pre_tokenizer: Any, normalizer: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    pieces = [END_OF_TEXT, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in TEXTS], trainer)
    # The trainer marks byte tokens as special; in SentencePiece's vocabularies they are ordinary.
    value = json.loads(tokenizer.to_str())
    value["added_tokens"] = [t for t in value["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(value))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    return tokenizer


def metaspace() -> Tokenizer:
    """As Mistral: a space before the first word of a text, and none after a special token."""
    tokenizer = _sentence_pieces(pre_tokenizers.Metaspace(prepend_scheme="first", split=False), None)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def prepended() -> Tokenizer:
    """As Llama 2: a space before the first word of a text, and after every special token too."""
    tokenizer = _sentence_pieces(None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


KINDS = {f.__name__: f for f in (byte_level, with_beginning, metaspace, prepended)}


def save(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    """The artifact's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder, eod=END_OF_TEXT, config=config)
    return folder


def write_records(path: Path, *records: Any) -> Path:
    """JSON lines; a record that is bytes or text is written as it stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Turns of user and assistant, one after the other."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]
