"""Learning from single answers that are wanted or not (KTO: arXiv 2402.01306).

A wanted answer is drawn above a reference point, an unwanted one below it. The point is the divergence of policy and
reference on answers that do not belong to their prompts. It is estimated from the whole global batch, in a pass of its own
before the step, so that it does not depend on how the batch is cut.

Shapes: 1 the row of a micro-batch, T its tokens, D its documents, each of which is an example.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from headrace_trainer import board
from headrace_trainer.engine.device import send
from headrace_trainer.engine.hooks import Hooks
from headrace_trainer.engine.logprobs import log_probs, score
from headrace_trainer.engine.losses import kto
from headrace_trainer.engine.objective import Loss
from headrace_trainer.engine.packed import PackedBatch, collate
from headrace_trainer.engine.packs import PackedSamples
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.engine.preference import ReferencedPack
from headrace_trainer.engine.step import Stepper
from headrace_trainer.formats.packs import Document, Pack, best_fit

_AT_ONCE = 16
"""Rows that go through a model together, where nothing is trained."""


@dataclass(frozen=True, kw_only=True)
class LabelledBatch:
    """A row of examples."""

    row: PackedBatch
    reference_D: torch.Tensor
    wanted_D: torch.Tensor
    """Bool."""
    weight: float
    """0 where the row only fills a round of micro-batches."""


class UnpairedPreference(PackedSamples):
    """The mean loss over examples.

    Attributes:
        reference_point: the divergence that examples are held against, in nats; set before each step.

    Args:
        beta: how strongly the policy is held to the reference.
        wanted_weight: of wanted examples.
        unwanted_weight: of unwanted ones.
        fixed: as ``PackedSamples``.
    """

    METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected", "wanted")

    def __init__(self, *, beta: float, wanted_weight: float, unwanted_weight: float, fixed: bool) -> None:
        super().__init__(fixed=fixed)
        self._beta, self._weights = beta, (wanted_weight, unwanted_weight)
        self.reference_point = 0.0

    def collate(self, samples: list[ReferencedPack], weights: list[float], device: torch.device) -> LabelledBatch:
        """Packs of labelled documents -> one row."""
        counted = [s for s, weight in zip(samples, weights, strict=True) if weight]
        shown = counted or samples[:1]
        return LabelledBatch(
            row=self.row([s.pack for s in samples], weights, device),
            reference_D=send(torch.from_numpy(np.concatenate([s.reference for s in shown])), device),
            wanted_D=send(torch.tensor([bool(d.label) for s in shown for d in s.pack.documents]), device),
            weight=float(bool(counted)),
        )

    def forward(
        self, model: torch.nn.Module, batch: LabelledBatch
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], Loss]]:
        """Losses of the row's examples."""
        output, scores = score(model, batch.row)

        def loss(output: torch.Tensor) -> Loss:
            log_probs_D = batch.row.sums(scores(output).log_probs_1T.float() * batch.row.mask_1T)
            return self._loss(batch, log_probs_D)

        return output, loss

    def _loss(self, batch: LabelledBatch, log_probs_D: torch.Tensor) -> Loss:
        ratios_D, wanted_D = log_probs_D - batch.reference_D, batch.wanted_D
        losses_D = kto(
            ratios_D,
            wanted_D,
            kl=self.reference_point,
            beta=self._beta,
            desirable_weight=self._weights[0],
            undesirable_weight=self._weights[1],
        )
        rewards_D, is_wanted_D = self._beta * ratios_D, wanted_D.float()
        above_D = ratios_D > max(self.reference_point, 0.0)
        figures = (
            rewards_D * is_wanted_D,
            rewards_D * (1 - is_wanted_D),
            (above_D == wanted_D).float(),
            log_probs_D * is_wanted_D,
            log_probs_D * (1 - is_wanted_D),
            is_wanted_D,
        )
        return Loss(
            total=losses_D.sum() * batch.weight,
            count=torch.tensor(int(losses_D.numel() * batch.weight), dtype=torch.int32, device=losses_D.device),
            metrics=tuple(figure.detach().sum() * batch.weight for figure in figures),
        )

    def figures(self, means: dict[str, float]) -> dict[str, float]:
        """Each kind's figures over the examples of that kind, as TRL has them; none of a kind that is not there."""
        share = {"chosen": means["wanted"], "rejected": 1 - means["wanted"]}
        found = {"rewards/accuracies": means["rewards/accuracies"]}
        for kind, part in share.items():
            if part > 0:
                found |= {f"{of}/{kind}": means[f"{of}/{kind}"] / part for of in ("rewards", "logps")}
        if all(part > 0 for part in share.values()):
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


def mismatched(documents: Sequence[Document], *, longest: int) -> list[Document]:
    """Each prompt with the answer of the document before it, the first with that of the last.

    Args:
        documents: at least one, each a prompt and an answer.
        longest: tokens of a document; what is beyond is cut off.
    """
    return [
        _joined(asked, answered, longest=longest)
        for asked, answered in zip(documents, [documents[-1], *documents[:-1]], strict=True)
    ]


def _joined(asked: Document, answered: Document, *, longest: int) -> Document:
    ends, begins = _answer_of(asked), _answer_of(answered)
    tokens = np.concatenate([asked.tokens[:ends], answered.tokens[begins:]])[:longest]
    mask = np.concatenate([asked.mask[:ends], answered.mask[begins:]])[:longest]
    return Document(tokens=tokens, mask=mask)


def _answer_of(document: Document) -> int:
    """Where the answer begins."""
    return int(document.mask.argmax())


class ManySamples(Protocol):
    """Packs by number."""

    def sample(self, index: int, /) -> Pack:
        """Pack ``index`` of the run."""


def mismatched_of(packs: ManySamples, first: int, size: int, *, longest: int) -> list[Document]:
    """The mismatched documents of packs ``first`` to ``first + size - 1``."""
    documents = [d for i in range(first, first + size) for d in packs.sample(i).documents]
    return mismatched(documents, longest=longest)


def total_log_prob(
    model: torch.nn.Module, documents: Sequence[Document], *, length: int, device: torch.device
) -> float:
    """The sum of the documents' log-probabilities, in nats. Every rank of the replica calls.

    Args:
        model: with a language model's head.
        documents: each of at most ``length`` tokens.
        length: tokens of a row.
        device: of the model.
    """
    if not documents:
        return 0.0
    bins = best_fit(np.array([len(d) for d in documents]), capacity=length)
    total = 0.0
    for first in range(0, len(bins), _AT_ONCE):
        packs = [
            Pack(documents=tuple(documents[int(i)] for i in bins[number]))
            for number in range(first, min(first + _AT_ONCE, len(bins)))
        ]
        rows = [collate(pack, length=length, device=device) for pack in packs]
        for row, found_T in zip(rows, log_probs(model, rows), strict=True):
            total += float(row.sums(found_T[None] * row.mask_1T).double().sum())
        board.beat()
    return total


def mean_log_prob(model: torch.nn.Module, documents: Sequence[Document], gang: Gang, *, length: int) -> float:
    """The mean of the documents' log-probabilities; replicas share the work. Every rank calls, and gets the same."""
    mine = documents[gang.data_rank :: gang.layout.data]
    found = total_log_prob(model, mine, length=length, device=gang.device)
    speaks = gang.tensor_rank == 0 and gang.is_first_stage
    (total,) = gang.sum([found if speaks else 0.0])
    return total / len(documents)


def mean_log_probs(
    model: torch.nn.Module, batch: Callable[[int], Sequence[Document]], gang: Gang, *, count: int, length: int
) -> np.ndarray:
    """The same of batches 0 to ``count - 1``, float64 [count]: each replica takes whole ones."""
    found = np.zeros(count)
    for i in range(gang.data_rank, count, gang.layout.data):
        documents = batch(i)
        found[i] = total_log_prob(model, documents, length=length, device=gang.device) / len(documents)
    speaks = gang.tensor_rank == 0 and gang.is_first_stage
    return np.array(gang.sum((found if speaks else 0 * found).tolist()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Mismatches:
    """What the reference model says of mismatched answers: means over a batch, in nats."""

    steps: np.ndarray
    """float64 [steps]."""
    held_out: float


class ReferencePoint(Hooks):
    """Estimates the reference point before each step and each measurement.

    Args:
        objective: takes it.
        training: packs of the run.
        held_out: packs that are measured.
        reference: what the reference model says of the same batches.
        batch_size: packs in a step.
        length: tokens of a row.
        gang: this rank's place.
    """

    def __init__(
        self,
        objective: UnpairedPreference,
        *,
        training: ManySamples,
        held_out: ManySamples | None,
        reference: Mismatches,
        batch_size: int,
        length: int,
        gang: Gang,
    ) -> None:
        self._objective, self._training, self._held_out = objective, training, held_out
        self._reference, self._batch_size, self._length, self._gang = reference, batch_size, length, gang
        self._kl = 0.0

    def before_step(self, first: int, stepper: Stepper) -> None:
        """Estimate it from the step's batch."""
        step = first // self._batch_size
        documents = mismatched_of(self._training, first, self._batch_size, longest=self._length)
        self._kl = self._estimate(stepper, documents, float(self._reference.steps[step]))

    def before_validation(self, size: int, stepper: Stepper) -> None:
        """Estimate it from the held-out batch."""
        assert self._held_out is not None
        documents = mismatched_of(self._held_out, 0, size, longest=self._length)
        self._estimate(stepper, documents, self._reference.held_out)

    def figures(self) -> Mapping[str, float]:
        """The reference point of the newest step."""
        return {"kl": self._kl}

    def _estimate(self, stepper: Stepper, documents: Sequence[Document], reference: float) -> float:
        stepper.gather_weights()
        mean = mean_log_prob(stepper.model, documents, self._gang, length=self._length)
        self._objective.reference_point = max(0.0, mean - reference)
        return self._objective.reference_point
