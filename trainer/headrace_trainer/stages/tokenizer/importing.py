"""Import an existing tokenizer: a tokenizer.json, or GPT-2's vocabulary and merges under either of their names.

In: a local folder. Out: a ``Tokenizer``, its end-of-document token, and its settings.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from headrace_trainer.errors import UserError
from headrace_trainer.formats.tokenizer import (
    CONFIG_FILE,
    END_OF_TEXT,
    TOKENIZER_FILE,
    read_json,
    read_tokenizer_json,
    token_text,
)
from headrace_trainer.stages.tokenizer.train import byte_level_bpe

VOCABULARIES = ("vocab.json", "encoder.json")
MERGES = ("merges.txt", "vocab.bpe")
WANTED = (TOKENIZER_FILE, CONFIG_FILE, *VOCABULARIES, *MERGES)
"""The files to look for; any others are ignored."""


@dataclass(frozen=True, kw_only=True)
class ImportedTokenizer:
    """An imported tokenizer."""

    tokenizer: Tokenizer
    eod: str
    config: dict[str, Any] = field(default_factory=dict)


def import_tokenizer(folder: Path, *, uri: str) -> ImportedTokenizer:
    """Read whichever format is there. Adds an end-of-document token if the tokenizer has none.

    Args:
        folder: holds those of the ``WANTED`` files that exist.
        uri: the folder's name in error messages.

    Raises:
        UserError: neither format is complete, or a file cannot be read.
    """
    config = read_json(folder / CONFIG_FILE)
    tokenizer = _read(folder, uri=uri)
    eod = token_text(config.get("eos_token")) or END_OF_TEXT
    tokenizer.add_special_tokens([AddedToken(eod, special=True, normalized=False)])
    return ImportedTokenizer(tokenizer=tokenizer, eod=eod, config=config)


def _read(folder: Path, *, uri: str) -> Tokenizer:
    if (folder / TOKENIZER_FILE).is_file():
        return read_tokenizer_json(folder / TOKENIZER_FILE)
    vocabulary, merges = _first(folder, VOCABULARIES), _first(folder, MERGES)
    if vocabulary is None or merges is None:
        found = ", ".join(sorted(name for name in WANTED if (folder / name).is_file())) or "none of its files"
        raise UserError(
            f"tokenizer.import.uri: {uri!r}: found {found}; the folder must hold {TOKENIZER_FILE}, "
            f"or one of {' and '.join(VOCABULARIES)} with one of {' and '.join(MERGES)}"
        )
    try:
        return byte_level_bpe(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"tokenizer.import.uri: {uri!r}: {vocabulary.name} and {merges.name} cannot be read as BPE: {error}; "
            "copy both again, from the same tokenizer"
        ) from error


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)
