"""The one boundary for bad manifests: whatever a file or object holds, the result is a run or a ``ManifestError``.

Each line of the error names field, value and remedy. In: a file, or an object from the API server. Next: ``plain_yaml``
reads text, the classes of ``run`` validate values, ``words`` phrases the errors.
"""

import difflib
import json
import math
import stat
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from headrace_api.base import FieldError
from headrace_api.plain_yaml import MAX_DEPTH, dotted, read_documents, shown
from headrace_api.run import ObjectMeta, RunStatus, TrainingRun, cluster_errors
from headrace_api.words import Location, blocks_in, describe, line, unknown

MAX_BYTES = 1_048_576
"""The largest manifest file. Kubernetes objects cannot be larger either."""

_MOST_BITS = 128
"""Size limit of a whole number: above any field's bound, and short enough to print."""


class ManifestError(ValueError):
    """An invalid manifest.

    Attributes:
        problems: one line per problem.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class Body(StrEnum):
    """Where a run will execute. In a cluster, relative paths have no meaning and there is no default storage."""

    LOCAL = "local"
    CLUSTER = "cluster"


def load_run(path: Path) -> TrainingRun:
    """Read the TrainingRun from a YAML file. Ignores other objects in it, and any status.

    Raises:
        ManifestError: the file is missing, is not YAML, or holds no valid run.
    """
    try:
        documents = read_documents(_text(path))
    except FieldError as error:
        where = f"{path}: {error.field}" if error.field else str(path)
        raise ManifestError([f"{where}: {error.value}: {error.remedy}"]) from error
    run = _only_run(path, documents)
    return parse_run({k: v for k, v in run.items() if k != "status"})


def _text(path: Path) -> str:
    """Read a manifest file.

    Raises:
        FieldError: not a regular file, too large, or not text.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            what = "a folder" if stat.S_ISDIR(found.st_mode) else "not an ordinary file"
            raise FieldError("", what, "name a YAML file")
        if found.st_size > MAX_BYTES:
            raise FieldError("", f"{found.st_size} bytes", f"a manifest has at most {MAX_BYTES}; name another file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES)
        return data.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise FieldError("", "no such file", "check the path") from error
    except UnicodeDecodeError as error:
        raise FieldError("", f"byte {error.start} is not UTF-8", "save the file as UTF-8 text") from error
    except (OSError, ValueError) as error:
        if isinstance(error, FieldError):
            raise
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise FieldError("", f"cannot be read: {said}", "check the path and its permissions") from error


def _only_run(path: Path, documents: Sequence[Any]) -> dict[str, Any]:
    runs = [d for d in documents if isinstance(d, dict) and d.get("kind") == "TrainingRun"]
    if len(runs) > 1:
        raise ManifestError(
            [f"{path}: {len(runs)} TrainingRun objects: keep one, and move the others to their own files"]
        )
    if runs:
        return runs[0]
    meant = [d for d in documents if not isinstance(d, dict) or _means_a_run(d)]
    if not meant:
        kinds = ", ".join(shown(d["kind"]) for d in documents) or "nothing"
        raise ManifestError([f"{path}: holds {kinds}: add an object with kind: TrainingRun"])
    if not isinstance(meant[0], dict):
        raise ManifestError([f"{path}: {shown(meant[0])}: write a block with apiVersion, kind, metadata and spec"])
    run: dict[str, Any] = meant[0]
    return run


def _means_a_run(document: dict[str, Any]) -> bool:
    """Whether a document without ``kind: TrainingRun`` was meant to be one."""
    kind = document.get("kind")
    if not isinstance(kind, str):
        return True
    near = difflib.get_close_matches(kind.lower(), ["trainingrun", "trainingruntime"], n=1, cutoff=0.75)
    return near == ["trainingrun"]


def parse_run(value: Mapping[str, Any], *, body: Body = Body.LOCAL) -> TrainingRun:
    """Validate a TrainingRun.

    Args:
        value: the object, as read from YAML or JSON; its status may come from any operator version.
        body: where it will run; ``CLUSTER`` accepts what the API server accepts with the CRD from ``crd.py``.

    Raises:
        ManifestError: one line per problem.
    """
    plain = _normal({k: v for k, v in value.items() if k != "status"}, TrainingRun)
    problems = _unknown_metadata(plain)
    try:
        # Strict and from JSON: dates, numbers and booleans are never converted into one another.
        run = TrainingRun.model_validate_json(json.dumps(plain, default=str), strict=True, by_name=False)
        # A status is read leniently, since any operator version may have written it.
        status = RunStatus.model_validate(value.get("status") or {})
    except ValidationError as error:
        raise ManifestError([*(describe(e, TrainingRun) for e in error.errors()), *problems]) from error
    if problems:
        raise ManifestError(problems)
    if body is Body.CLUSTER and (errors := cluster_errors(run)):
        raise ManifestError([line(e.field, e.value, e.remedy) for e in errors])
    return run.model_copy(update={"status": status})


def _normal(value: Any, model: type[BaseModel] | None, path: Location = ()) -> Any:
    """Normalise a value like the API server: a key without a value is dropped, and 16.0 becomes 16.

    Args:
        value: a part of the manifest.
        model: the class of this block, or of the blocks in this list. Its unknown fields are kept even if empty, so
            that they are rejected.
        path: where it is.

    Raises:
        ManifestError: it holds what JSON cannot carry and no field can mean.
    """
    if len(path) > MAX_DEPTH:
        raise ManifestError([f"{dotted(path[:4])}: nested more than {MAX_DEPTH} deep: is a bracket left open?"])
    if isinstance(value, list):
        return [_normal(item, model, (*path, i)) for i, item in enumerate(value)]
    if isinstance(value, dict):
        inside = blocks_in(model) if model is not None else {}
        kept = {k: v for k, v in value.items() if v is not None or (model is not None and k not in inside)}
        return {k: _normal(v, inside.get(k), (*path, k)) for k, v in kept.items()}
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ManifestError([f"{dotted(path)}: {value}: write a finite number"])
        return int(value) if value.is_integer() and abs(value) < 2**63 else value
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ManifestError([f"{dotted(path)}: a number of {value.bit_length()} bits: write a smaller one"])
    return value


def _unknown_metadata(value: Mapping[str, Any]) -> list[str]:
    """Reject unknown metadata fields as the API server does; ``ObjectMeta`` itself ignores fields it does not read."""
    metadata = value.get("metadata")
    if not isinstance(metadata, dict):
        return []
    known = [*blocks_in(ObjectMeta), *ObjectMeta.OTHERS]
    return [unknown(("metadata", name), known) for name in metadata if name not in known]
