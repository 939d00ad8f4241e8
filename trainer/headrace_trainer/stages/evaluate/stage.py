"""The evaluate stage: load, measure, ask, compare, report, check the requirements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace_api.stages import Evaluate
from headrace_api.stages.evaluate import meets
from headrace_trainer.engine.answers import Answered, answers
from headrace_trainer.engine.model.loading import load_model
from headrace_trainer.engine.parallel import Gang, join_gang
from headrace_trainer.errors import Stopped, UserError
from headrace_trainer.formats.chat import Encoder
from headrace_trainer.formats.model_card import HISTORY_FILE, TOKENIZER_FOLDER, ModelCard, read_card
from headrace_trainer.formats.shards.manifest import UNIGRAM_FILE, Manifest
from headrace_trainer.formats.shards.reader import TokenDataset
from headrace_trainer.formats.shards.split import Split
from headrace_trainer.formats.tokenizer import load_tokenizer
from headrace_trainer.stage import StageContext
from headrace_trainer.stages.evaluate.curve import CURVE_FILE, draw_curve
from headrace_trainer.stages.evaluate.losses import evaluation_layout, token_losses
from headrace_trainer.stages.evaluate.measures import bits_per_byte, perplexity
from headrace_trainer.stages.evaluate.questions import Asked, read_questions
from headrace_trainer.stages.evaluate.report import choose_examples, write_report
from headrace_trainer.stages.evaluate.unigram import unigram_losses


def run_evaluate(ctx: StageContext) -> dict[str, float]:
    """Measure, report and check. Every rank calls it.

    Returns:
        loss, perplexity, bitsPerByte, the baseline's unigramLoss, unigramPerplexity and unigramRatio, and for each
        question set the share of right answers.

    Raises:
        UserError: a requirement is missed, or the model cannot be divided over the ranks.
        Stopped: on request; an evaluation keeps no partial result.
    """
    config = ctx.config
    assert isinstance(config, Evaluate)
    trained, shards = ctx.input("model"), ctx.input("shards")
    card = read_card(trained)
    samples = TokenDataset(shards, Split.VALIDATION, card.sequence_length, ctx.resolved.seed, verify=False)
    num_windows = max(1, min(samples.num_samples, config.max_tokens // card.sequence_length))
    measured = _measure(ctx, card, trained, samples, num_windows=num_windows)
    tokens_NT = np.stack([samples.sample(i)[1:] for i in range(num_windows)])
    baseline = float(unigram_losses(np.load(shards / UNIGRAM_FILE), tokens_NT).mean())
    metrics = summarize(measured.losses_NT, unigram_loss=baseline, manifest=samples.manifest)
    metrics |= {name: sum(a.is_right for a in given) / len(given) for name, given in measured.answers.items()}
    if ctx.rank == 0:
        examples = choose_examples(measured.losses_NT, tokens_NT, load_tokenizer(shards / TOKENIZER_FOLDER).tokenizer)
        # The history of a model that was trained to answer holds losses on records, not on text.
        has_curve = not card.stop_ids
        write_report(ctx.output, metrics=metrics, examples=examples, answers=measured.answers, curve=has_curve)
        if has_curve:
            draw_curve(
                trained / HISTORY_FILE,
                unigram_loss=baseline,
                name=ctx.resolved.run,
                num_parameters=card.architecture.num_parameters(card.vocab_size),
                out=ctx.output / CURVE_FILE,
            )
    check_requirements(config, metrics)
    return metrics


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Results of running the model."""

    losses_NT: NDArray[np.float32]
    """Every token's loss."""
    answers: Mapping[str, Sequence[Answered]]
    """Answers to each question set, by metric."""


def _measure(ctx: StageContext, card: ModelCard, trained: Path, samples: TokenDataset, *, num_windows: int) -> Measured:
    """Losses and answers, with the model split over all ranks."""
    axes, exam = evaluation_layout(card, num_ranks=ctx.world), _read_exam(ctx, card, trained)
    with join_gang(
        axes, rank=ctx.rank, local_rank=ctx.local_rank, local_world=ctx.resolved.stage.compute.ranks
    ) as ranks:
        ctx.report(phase="Loading", message="reading the checkpoint")
        model = load_model(card, trained, ranks)

        def tell(done: int, *, total: int = num_windows, unit: str = "windows") -> None:
            ctx.report(phase="Evaluating", done=done, total=total, unit=unit)
            _stop_together(ctx, ranks)

        return Measured(
            losses_NT=token_losses(model, samples, gang=ranks, num_windows=num_windows, tell=tell),
            answers={
                asked.metric: answers(
                    model,
                    asked.questions,
                    tokenizer=asked.encoder.tokenizer,
                    card=card,
                    max_tokens=asked.max_tokens,
                    gang=ranks,
                    tell=partial(tell, total=len(asked.questions), unit="questions"),
                )
                for asked in exam
            },
        )


def _read_exam(ctx: StageContext, card: ModelCard, trained: Path) -> list[Asked]:
    """The question sets of the stage."""
    config = ctx.config
    assert isinstance(config, Evaluate)
    if not config.exact_match:
        return []
    encoder = Encoder(trained / TOKENIZER_FOLDER, sequence_length=card.sequence_length)
    storage, scratch = ctx.resolved.storage, ctx.scratch / f"questions-{ctx.rank}"
    return [
        read_questions(named, encoder, field=f"evaluate.exactMatch[{i}].uri", storage=storage, scratch=scratch)
        for i, named in enumerate(config.exact_match)
    ]


def _stop_together(ctx: StageContext, ranks: Gang) -> None:
    """Stop if any pod was asked to: a rank that went on alone would wait for the others for ever."""
    if ranks.sum([float(ctx.stop_requested())])[0]:
        raise Stopped("stopped; the next attempt starts the evaluation over")


def summarize(losses_NT: NDArray[np.float32], *, unigram_loss: float, manifest: Manifest) -> dict[str, float]:
    """The metrics of an evaluation.

    Args:
        losses_NT: each token's loss, in nats.
        unigram_loss: the baseline's mean over the same tokens.
        manifest: tells the bytes of text per token.
    """
    loss = float(losses_NT.mean(dtype=np.float64))
    bytes_per_token = manifest.bytes[Split.VALIDATION] / manifest.tokens[Split.VALIDATION]
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bitsPerByte": bits_per_byte(loss, bytes_per_token=bytes_per_token),
        "unigramLoss": unigram_loss,
        "unigramPerplexity": perplexity(unigram_loss),
        "unigramRatio": perplexity(unigram_loss) / perplexity(loss),
        "tokensIn": float(losses_NT.size),
    }


def check_requirements(config: Evaluate, metrics: dict[str, float]) -> None:
    """Check the metrics against the stage's ``require``.

    Raises:
        UserError: names every missed bound.
    """
    missed = [
        f"evaluate.require.{metric}: {metrics[metric]:.4g} is not {bound}"
        for metric, bound in config.require.items()
        if not meets(bound, metrics[metric])
    ]
    if missed:
        raise UserError("; ".join(missed) + ": train longer, on more text or with a larger model, or require less")
