"""What the model that training starts from says of every document: computed once, kept in storage.

In: the starting model and encoded pairs. Out: a log-probability for each document. The key in storage is made of the
digests that it depends on, so that a later attempt, or another beta on the same pairs, finds it.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from headrace_api.stages import Dpo
from headrace_trainer.engine.finetune import Start
from headrace_trainer.engine.logprobs import log_probs
from headrace_trainer.engine.packed import PackedBatch
from headrace_trainer.engine.packs import PackSamples, values_of_pairs
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.engine.preference import ReferencedPack
from headrace_trainer.stage import StageContext


@dataclass(frozen=True, kw_only=True)
class References:
    """Log-probabilities of documents, summed over the labels that are trained on, in nats."""

    train: np.ndarray
    """float32 [units, 2]."""
    validation: np.ndarray

    def dumps(self) -> bytes:
        """As bytes that ``loads`` takes."""
        out = io.BytesIO()
        np.savez(out, train=self.train, validation=self.validation)
        return out.getvalue()

    @classmethod
    def loads(cls, data: bytes) -> "References":
        """What ``dumps`` gave."""
        found = np.load(io.BytesIO(data))
        return cls(train=found["train"], validation=found["validation"])


def references(ctx: StageContext, gang: Gang, start: Start) -> References:
    """What is in storage, or else what the starting model says. Every rank calls.

    Raises:
        StorageError: storage does not answer.
    """
    dataset = start.dataset
    held_out = dataset.validation
    digests = [dataset.train.digest, held_out.digest if held_out is not None else None]
    parts = [start.origin.digest, *digests, start.card.precision]
    key = f"{ctx.resolved.stage.name}/reference/{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.npz"

    def stored() -> bytes | None:
        return ctx.store.get_bytes(key) if ctx.store.exists(key) else None

    found = gang.from_first(stored)
    if found is None:
        ctx.report(phase="Running", message="log-probabilities under the starting model")
        config = ctx.config
        assert isinstance(config, Dpo)
        model = start.build(gang, config, seed=ctx.resolved.seed).eval()

        def summed(rows: list[PackedBatch]) -> list[torch.Tensor]:
            found = log_probs(model, rows)
            return [row.sums(row_T[None] * row.mask_1T) for row, row_T in zip(rows, found, strict=True)]

        length = config.sequence_length
        made = References(
            train=values_of_pairs(dataset.train, gang, length=length, values=summed),
            validation=values_of_pairs(held_out, gang, length=length, values=summed),
        )
        found = made.dumps()
        gang.from_first(lambda: ctx.store.put_bytes(key, found))
    kept = ctx.output / "reference" / Path(key).name
    if gang.is_first:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(found)
    return References.loads(found)


@dataclass(frozen=True)
class ReferencedSamples:
    """Packs of pairs with the log-probabilities of their documents, as the loop's ``Samples``."""

    packs: PackSamples
    reference: np.ndarray
    """float32 [units, 2]."""

    @property
    def num_samples(self) -> int:
        """Packs in an epoch."""
        return self.packs.num_samples

    def sample(self, index: int) -> ReferencedPack:
        """Pack ``index`` of the run."""
        units = self.packs.order.units(index)
        return ReferencedPack(pack=self.packs.sample(index), reference=self.reference[units].reshape(-1))
