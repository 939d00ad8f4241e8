"""What every stage kind declares: its name, what it consumes and produces, and how it runs.

Each file ``<kind>.py`` next to this one holds one kind's fields, defaults and checks; ``__init__`` lists them.
"""

from collections.abc import Collection, Iterator
from enum import StrEnum
from typing import Any, ClassVar, get_args

from headrace_api.base import Name, Part, Spec


class ArtifactKind(StrEnum):
    """What a finished stage leaves in storage."""

    CORPUS = "corpus"
    """Cleaned documents: JSONL, gzip."""
    TOKENIZER = "tokenizer"
    """A tokenizer.json with its Hugging Face configuration."""
    SHARDS = "shards"
    """Token ids: Megatron .bin/.idx pairs, a manifest and the tokenizer."""
    CHECKPOINT = "checkpoint"
    """A Megatron torch_dist checkpoint of a model, with its architecture and tokenizer."""
    REWARD = "reward"
    """A Megatron torch_dist checkpoint of a model with a scalar head, with its architecture and tokenizer."""
    RECORDS = "records"
    """Records to train on: JSON lines, with the transcripts that they come from."""
    EVALUATION = "evaluation"
    """Scores, with the report that explains them."""
    HUGGINGFACE = "huggingface"
    """A folder that transformers and vLLM load."""
    ENDPOINT = "endpoint"
    """A server that answers."""


class RunsAs(StrEnum):
    """How the pods of a stage relate to one another."""

    TASKS = "tasks"
    """Independent ranks: each reads its part of the input; none waits for another."""
    GANG = "gang"
    """Ranks that compute together: all of them live, or none."""
    SERVICE = "service"
    """Replicas that serve until the run is deleted."""


class Inputs(Spec):
    """Names of earlier stages, by slot."""

    ACCEPTS: ClassVar[dict[str, ArtifactKind]] = {}

    def by_slot(self) -> dict[str, str]:
        """Slot -> the stage whose artifact fills it."""
        return {slot: name for slot in self.ACCEPTS if (name := getattr(self, slot)) is not None}

    def dump_without(self, parts: Collection[Part]) -> dict[str, Any]:
        """Empty: an input is identified by its artifact's digest, not by the name of its stage."""
        return {}


class StageConfig(Spec):
    """The typed block of a stage."""

    KIND: ClassVar[str]
    GIVES: ClassVar[ArtifactKind]
    RUNS_AS: ClassVar[RunsAs]

    def inputs(self) -> dict[str, str]:
        """Slot -> the stage whose artifact fills it; empty if the stage has no inputs."""
        block = getattr(self, "from_", None)
        return block.by_slot() if isinstance(block, Inputs) else {}

    @classmethod
    def slots(cls) -> dict[str, tuple[ArtifactKind, tuple[str, ...]]]:
        """Slot -> the kind of artifact it accepts, and those of the fields ``from`` and ``from.<slot>`` that are optional."""
        field = cls.model_fields.get("from_")
        if field is None:
            return {}
        block = next(a for a in (field.annotation, *get_args(field.annotation)) if _is_inputs(a))
        whole = () if field.is_required() else ("from",)
        return {
            slot: (kind, whole if block.model_fields[slot].is_required() else (*whole, f"from.{slot}"))
            for slot, kind in block.ACCEPTS.items()
        }

    def addresses(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Place and value of every field that names files of the user's: all that are called ``uri``."""
        yield from _addresses(self.dump(), ())


def _addresses(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, found in inside:
        if key == "uri":
            yield (*path, key), found
        else:
            yield from _addresses(found, (*path, key))


def _is_inputs(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Inputs)


StageName = Name
