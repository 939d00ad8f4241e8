"""The order of an evaluation: load, measure, compare, show, and hold what was required against it."""

import numpy as np
from numpy.typing import NDArray

from headrace_api.stages import Evaluate
from headrace_api.stages.evaluate import meets
from headrace_trainer.errors import UserError
from headrace_trainer.evaluate.curve import draw_curve
from headrace_trainer.evaluate.losses import evaluation_layout, load_model, token_losses
from headrace_trainer.evaluate.measures import bits_per_byte, perplexity
from headrace_trainer.evaluate.report import choose_examples, examples_table, figures_table, write_report
from headrace_trainer.evaluate.unigram import unigram_losses
from headrace_trainer.model.card import HISTORY_FILE, read_card
from headrace_trainer.parallel import gang
from headrace_trainer.shards.manifest import UNIGRAM_FILE, Manifest
from headrace_trainer.shards.reader import TokenDataset
from headrace_trainer.shards.split import Split
from headrace_trainer.stage import StageContext
from headrace_trainer.tokenizer.files import load_tokenizer


def run_evaluate(ctx: StageContext) -> dict[str, float]:
    """Measure, report and check.

    Returns:
        loss, perplexity, bitsPerByte, and the baseline's unigramLoss, unigramPerplexity and unigramRatio.

    Raises:
        UserError: a requirement is missed, or the ranks do not divide the model.
    """
    config = ctx.config
    assert isinstance(config, Evaluate)
    trained, shards = ctx.input("model"), ctx.input("shards")
    card = read_card(trained)
    samples = TokenDataset(shards, Split.VALIDATION, card.sequence_length, ctx.resolved.seed, verify=False)
    num_windows = max(1, min(samples.num_samples, config.max_tokens // card.sequence_length))
    axes = evaluation_layout(card, num_ranks=ctx.world)
    with gang(axes, rank=ctx.rank, local_rank=ctx.local_rank, local_world=ctx.resolved.stage.compute.ranks) as ranks:
        model = load_model(card, trained, ranks)

        def tell(done: int) -> None:
            ctx.report(phase="Evaluating", done=done, total=num_windows, unit="windows")

        losses_NT = token_losses(model, samples, gang=ranks, num_windows=num_windows, tell=tell)
    tokens_NT = np.stack([samples.sample(i)[1:] for i in range(num_windows)])
    baseline = float(unigram_losses(np.load(shards / UNIGRAM_FILE), tokens_NT).mean())
    metrics = summarize(losses_NT, unigram_loss=baseline, manifest=samples.manifest)
    if ctx.rank == 0:
        tokenizer = load_tokenizer(shards / "tokenizer").tokenizer
        examples = choose_examples(losses_NT, tokens_NT, tokenizer)
        tables = [figures_table(metrics), examples_table(examples)]
        write_report(ctx.output, metrics=metrics, tables=tables, examples=examples)
        title = f"{ctx.resolved.run}: {card.architecture.num_parameters(card.vocab_size) / 1e6:.1f}M parameters"
        draw_curve(trained / HISTORY_FILE, unigram_loss=baseline, title=title, out=ctx.output / "loss_curve.png")
    check_requirements(config, metrics)
    return metrics


def summarize(losses_NT: NDArray[np.float32], *, unigram_loss: float, manifest: Manifest) -> dict[str, float]:
    """The figures of an evaluation.

    Args:
        losses_NT: of each token, in nats.
        unigram_loss: the baseline's mean over the same tokens.
        manifest: for the bytes of text that a token stands for.
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
    """Hold the stage's ``require`` against the figures.

    Raises:
        UserError: names every bound that is missed.
    """
    missed = [
        f"evaluate.require.{metric}: {metrics[metric]:.4g} is not {bound}"
        for metric, bound in config.require.items()
        if not meets(bound, metrics[metric])
    ]
    if missed:
        raise UserError("; ".join(missed) + ": train longer, on more text or a larger model, or require less")
