"""What the model that training starts from says of the records: computed once, kept in storage.

In: the starting model and encoded records. Out: a log-probability for each document, and for KTO a mean over the mismatched
answers of each step. The key in storage is made of what they depend on, so that a later attempt, or another beta on the same
records, finds them.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from headrace_api.stages import Dpo
from headrace_trainer.engine.device.megatron import MegatronModule
from headrace_trainer.engine.finetune import Start
from headrace_trainer.engine.logprobs import log_probs
from headrace_trainer.engine.packed import PackedBatch
from headrace_trainer.engine.packs import PackSamples, values_of_documents
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.engine.preference import ReferencedPack
from headrace_trainer.engine.unpaired import Mismatches, mean_log_probs, mismatched_of
from headrace_trainer.stage import StageContext

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class References:
    """Log-probabilities of documents, summed over the labels that are trained on, in nats."""

    train: np.ndarray
    """float32 [units, documents of one]."""
    validation: np.ndarray


class Reference:
    """The starting model, asked only for what is not in storage. Every rank calls the same methods.

    Args:
        ctx: the stage.
        gang: this rank's place.
        start: what the stage begins with.
    """

    def __init__(self, ctx: StageContext, gang: Gang, start: Start) -> None:
        config = ctx.config
        assert isinstance(config, Dpo)
        self._ctx, self._config, self._gang, self._start = ctx, config, gang, start
        self._model: MegatronModule | None = None

    def documents(self, *, each: int) -> References:
        """Of every document; ``each`` is how many a unit has.

        Raises:
            StorageError: storage does not answer.
        """
        dataset, gang, length = self._start.dataset, self._gang, self._config.sequence_length

        def summed(rows: list[PackedBatch]) -> list[torch.Tensor]:
            found = log_probs(self._starting(), rows)
            return [row.sums(row_T[None] * row.mask_1T) for row, row_T in zip(rows, found, strict=True)]

        def make() -> Arrays:
            return {
                "train": values_of_documents(dataset.train, gang, each=each, length=length, values=summed),
                "validation": values_of_documents(dataset.validation, gang, each=each, length=length, values=summed),
            }

        return References(**self._kept([], make))

    def mismatches(self, training: PackSamples, held_out: PackSamples | None, *, steps: int) -> Mismatches:
        """Of the mismatched answers of every step, and of those that are measured.

        Raises:
            StorageError: storage does not answer.
        """
        config, gang, length = self._config, self._gang, self._config.sequence_length
        size, measured = config.global_batch_size, _num_measured(config, held_out)

        def means(packs: PackSamples, size: int, *, count: int) -> np.ndarray:
            return mean_log_probs(
                self._starting(),
                lambda i: mismatched_of(packs, i * size, size, longest=length),
                gang,
                count=count,
                length=length,
            )

        def make() -> Arrays:
            held = means(held_out, measured, count=1) if held_out is not None else np.zeros(1)
            return {"steps": means(training, size, count=steps), "held_out": held}

        weights = [share.weight for share in self._start.dataset.shares]
        parts = [self._ctx.resolved.seed, size, steps, length, config.packing, weights, measured]
        found = self._kept(parts, make)
        return Mismatches(steps=found["steps"], held_out=float(found["held_out"][0]))

    def _starting(self) -> MegatronModule:
        if self._model is None:
            self._ctx.report(phase="Running", message="log-probabilities under the starting model")
            self._model = self._start.build(self._gang, self._config, seed=self._ctx.resolved.seed).eval()
        return self._model

    def _kept(self, parts: list[object], make: Callable[[], Arrays]) -> Arrays:
        """What is in storage, or else what ``make`` makes; ``parts`` are what it depends on besides model and records."""
        dataset = self._start.dataset
        digests = [dataset.train.digest, dataset.validation.digest if dataset.validation is not None else None]
        named = json.dumps([self._start.origin.digest, *digests, self._start.card.precision, *parts])
        key = f"{self._ctx.resolved.stage.name}/reference/{hashlib.sha256(named.encode()).hexdigest()}.npz"
        store = self._ctx.store

        def stored() -> bytes | None:
            return store.get_bytes(key) if store.exists(key) else None

        found = self._gang.from_first(stored)
        if found is None:
            self._starting()  # every rank builds its part, also where its replica has nothing to do
            made = _dumps(make())
            self._gang.from_first(lambda: store.put_bytes(key, made))
            found = made
        if self._gang.is_first:
            kept = self._ctx.output / "reference" / Path(key).name
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(found)
        return _loads(found)


def _num_measured(config: Dpo, held_out: PackSamples | None) -> int:
    return min(config.validation.samples, held_out.num_samples) if held_out is not None else 0


def _dumps(arrays: Arrays) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def _loads(data: bytes) -> Arrays:
    return dict(np.load(io.BytesIO(data)))


@dataclass(frozen=True)
class ReferencedSamples:
    """Packs with the log-probabilities of their documents, as the loop's ``Samples``."""

    packs: PackSamples
    reference: np.ndarray
    """float32 [units, documents of one]."""

    @property
    def num_samples(self) -> int:
        """Packs in an epoch."""
        return self.packs.num_samples

    def sample(self, index: int) -> ReferencedPack:
        """Pack ``index`` of the run."""
        units = self.packs.order.units(index)
        return ReferencedPack(pack=self.packs.sample(index), reference=self.reference[units].reshape(-1))
