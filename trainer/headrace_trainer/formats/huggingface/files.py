"""A Hugging Face folder, on disk or in S3: brought to this node, checked whole, and read tensor by tensor.

In: an address. Out: a ``PretrainedFolder``: its architecture, what it is called, and parts of its tensors.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from headrace_api.model import Architecture
from headrace_trainer import board
from headrace_trainer.errors import UserError
from headrace_trainer.formats.huggingface.configs import architecture_from
from headrace_trainer.formats.huggingface.names import shapes
from headrace_trainer.formats.tokenizer import CONFIG_FILE, SPECIAL_TOKENS_FILE, TOKENIZER_FILE, read_json
from headrace_trainer.storage import ObjectStore

MODEL_CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_FILES = (TOKENIZER_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE, "chat_template.jinja")
_EXPORT = "write it again, with save_pretrained of transformers and its tokenizer"
_NUMBERS = {"F32", "F16", "BF16"}
_COMPUTED = ("rotary_emb.inv_freq",)
"""Tensors of old folders that follow from config.json."""


@dataclass(frozen=True, kw_only=True)
class PretrainedFolder:
    """A model that was trained elsewhere, on this node."""

    folder: Path
    architecture: Architecture
    vocab_size: int
    context: int
    """Tokens that it was made for."""
    bos_id: int | None
    files: dict[str, str]
    """The file of every tensor, by the tensor's name."""
    digest: str
    """Of everything that was read: files of another model have another one."""

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    def part(self, name: str, place: tuple[slice, ...]) -> torch.Tensor:
        """A part of a tensor; no more than that is read."""
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            part: torch.Tensor = file.get_slice(name)[place]
            return part


def bring_pretrained(
    store: ObjectStore, scratch: Path, *, field: str, check: Callable[[Architecture], None]
) -> PretrainedFolder:
    """Bring a folder to this node and check it, its configuration first.

    Args:
        store: of the folder.
        scratch: where files from a bucket go.
        field: of the manifest that names the folder.
        check: refuses an architecture, before the weights are fetched.

    Raises:
        UserError: it cannot be trained here, or is not whole; with the remedy.
        StorageError: storage does not answer.
    """
    there = {info.key for info in store.list()}
    try:
        _need(there, MODEL_CONFIG)
        folder = _bring(store, scratch, [MODEL_CONFIG])
        raw = read_json(folder / MODEL_CONFIG)
        architecture = architecture_from(raw)
        check(architecture)
        _need(there, TOKENIZER_FILE)
        _bring(store, scratch, [name for name in _TOKENIZER_FILES if name in there])
        if INDEX in there:
            _bring(store, scratch, [INDEX])
        elif WEIGHTS not in there:
            raise UserError(f"found no {WEIGHTS} and no {INDEX}: convert its weights to safetensors: {_EXPORT}")
        files = sorted(set(weight_files(folder).values())) if INDEX in there else [WEIGHTS]
        for name in files:
            _need(there, name)
        _bring(store, scratch, files)
        vocab_size = _check_tensors(folder, raw, architecture)
    except UserError as error:
        raise UserError(f"{field}: {store.uri!r}: {error}") from error
    read = [name for name in (MODEL_CONFIG, *_TOKENIZER_FILES, *files) if name in there]
    bos_id = raw.get("bos_token_id")
    return PretrainedFolder(
        folder=folder,
        architecture=architecture,
        vocab_size=vocab_size,
        context=int(raw.get("max_position_embeddings") or 0),
        bos_id=bos_id if isinstance(bos_id, int) else None,
        files=weight_files(folder),
        digest=_digest(folder, read, kept=scratch.with_name(f"{scratch.name}.digest")),
    )


def weight_files(folder: Path) -> dict[str, str]:
    """The file of every tensor, by the tensor's name.

    Raises:
        UserError: a file is not safetensors.
    """
    if (folder / INDEX).is_file():
        named = read_json(folder / INDEX).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise UserError(f"{INDEX}: names no files in weight_map; copy it again")
        return {str(name): str(file) for name, file in named.items()}
    return dict.fromkeys(_headers(folder / WEIGHTS), WEIGHTS)


def _headers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Number format and shape of every tensor of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (found.get_dtype(), tuple(found.get_shape())) for name, found in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path.name}: cannot be read as safetensors: {error}; copy it again") from error


def _need(there: set[str], name: str) -> None:
    if name not in there:
        raise UserError(f"found no {name}: {_EXPORT}")


def _bring(store: ObjectStore, scratch: Path, names: list[str]) -> Path:
    folder = store.local_path("")
    if folder is not None:
        return folder
    scratch.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (scratch / name).exists():
            store.get_file(name, scratch / f".{name}")
            (scratch / f".{name}").rename(scratch / name)
    return scratch


def _check_tensors(folder: Path, raw: dict[str, Any], architecture: Architecture) -> int:
    """Hold every tensor against what the configuration says; the size of the vocabulary."""
    files = weight_files(folder)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(set(files.values())):
        found |= _headers(folder / file)
    embedding = found.get("model.embed_tokens.weight", ("", (0,)))
    vocab_size = embedding[1][0]
    expected = shapes(architecture, vocab_size=vocab_size)
    ignored = {"lm_head.weight"} if architecture.tie_embeddings else set()
    missing = sorted((expected.keys() - found.keys()) | (expected.keys() - files.keys()))
    foreign = sorted(n for n in found.keys() - expected.keys() - ignored if not n.endswith(_COMPUTED))
    if missing:
        raise UserError(f"its files lack {_some(missing)}: {_EXPORT}")
    kind = architecture.family.value
    if foreign:
        raise UserError(f"it has {_some(foreign)}, which a {kind} model has not: start from a model without")
    for name, shape in expected.items():
        number, has = found[name]
        if has != shape:
            raise UserError(
                f"{name} is {list(has)}, and by config.json {list(shape)}; correct config.json, or {_EXPORT}"
            )
        if number not in _NUMBERS:
            raise UserError(f"{name} is {number}: start from weights in bf16, fp16 or fp32")
    return int(vocab_size)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _digest(folder: Path, names: list[str], *, kept: Path) -> str:
    """One rank reads everything; the node's others find what it found."""
    if kept.exists():
        return kept.read_text()
    found = hashlib.sha256()
    for name in names:
        with (folder / name).open("rb") as file:
            one = hashlib.sha256()
            while chunk := file.read(2**24):
                one.update(chunk)
                board.beat()
        found.update(json.dumps([name, one.hexdigest()]).encode())
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(found.hexdigest())
    return found.hexdigest()
