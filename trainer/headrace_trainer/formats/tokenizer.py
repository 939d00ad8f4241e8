"""The tokenizer artifact: a folder that ``AutoTokenizer`` loads offline.

``save_tokenizer`` writes it, ``load_tokenizer`` reads it; ``shards``, ``evaluate``, ``export`` and ``deploy`` use it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from headrace_trainer.errors import UserError

END_OF_TEXT = "<|endoftext|>"
"""Ends every document, if the tokenizer was trained here or names no other end-of-document token."""

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"


@dataclass(frozen=True, kw_only=True)
class LoadedTokenizer:
    """A tokenizer and its end-of-document token."""

    tokenizer: Tokenizer
    eod: str
    eod_id: int

    @property
    def vocab_size(self) -> int:
        """The largest id plus one. More than the number of tokens if the vocabulary has gaps."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, eod: str, config: dict[str, Any] | None = None) -> None:
    """Write the artifact.

    Args:
        tokenizer: must have ``eod`` in its vocabulary.
        folder: must exist.
        eod: the token that ends a document.
        config: settings of an imported tokenizer to keep, such as its chat template.
    """
    defaults = {"clean_up_tokenization_spaces": False, "bos_token": eod, "unk_token": eod}
    forced = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eod}
    tokenizer.save(str(folder / TOKENIZER_FILE), pretty=False)
    _write_json(folder / CONFIG_FILE, defaults | (config or {}) | forced)
    _write_json(folder / SPECIAL_TOKENS_FILE, {"eos_token": eod})


def load_tokenizer(folder: Path) -> LoadedTokenizer:
    """Read the artifact.

    Raises:
        UserError: a file is missing or unreadable, or the end-of-document token is not in the vocabulary.
    """
    tokenizer = read_tokenizer_json(folder / TOKENIZER_FILE)
    eod = token_text(read_json(folder / CONFIG_FILE).get("eos_token"))
    eod_id = None if eod is None else tokenizer.token_to_id(eod)
    if eod is None or eod_id is None:
        raise UserError(f"{folder / CONFIG_FILE}: eos_token {eod!r} is not in the vocabulary; name one that is")
    return LoadedTokenizer(tokenizer=tokenizer, eod=eod, eod_id=eod_id)


def read_tokenizer_json(path: Path) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        UserError: it is unreadable.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: cannot be read as a tokenizer.json: {error}; copy or export it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; empty if there is no file.

    Raises:
        UserError: it is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}; copy or export it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON {type(value).__name__}, not an object; copy or export it again")
    return value


def token_text(token: object) -> str | None:
    """The text of a token in ``tokenizer_config.json``: a string, or an object with ``content``."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
