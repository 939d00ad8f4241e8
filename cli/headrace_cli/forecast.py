"""``headrace plan``: what each stage would do and need, before anything is started."""

from typing import Any

from rich.table import Table

from headrace_api.artifact import stage_hash
from headrace_api.model import padded_vocab
from headrace_api.planning import estimate_pretrain
from headrace_api.run import Stage, StageState, TrainingRun
from headrace_operator.brain.report import people_count

_DEFAULT_VOCAB = 32_768


def forecast(run: TrainingRun) -> list[dict[str, Any]]:
    """One row a stage: whether it would run, its ranks, and for pretraining its arithmetic.

    Args:
        run: the manifest, with the status of an earlier run where there is one.
    """
    rows, unchanged = [], True
    known = {s.name: s for s in run.status.stages}
    for stage in run.spec.stages:
        before = known.get(stage.name)
        inputs = {slot: known[s].artifact for slot, s in stage.config.inputs().items() if s in known}
        digests = {slot: ref.digest for slot, ref in inputs.items() if ref is not None}
        same = before is not None and before.hash == stage_hash(stage.config, seed=run.spec.seed, inputs=digests)
        unchanged = unchanged and same and before is not None and before.state is StageState.SUCCEEDED
        action = "skip" if unchanged and stage.kind != "deploy" else "run"
        rows.append({"stage": stage.name, "kind": stage.kind, "action": action, **_needs(run, stage)})
    return rows


def _needs(run: TrainingRun, stage: Stage) -> dict[str, Any]:
    compute = stage.compute
    needs: dict[str, Any] = {
        "nodes": compute.nodes,
        "ranks": compute.world,
        "gpus": compute.nodes * compute.gpus_per_node,
    }
    if stage.pretrain is None:
        return needs
    vocab = _vocab_size(run)
    estimate = estimate_pretrain(stage.pretrain, num_ranks=compute.world, vocab_size=vocab)
    axes = stage.pretrain.parallelism
    return needs | {
        "layout": f"tensor {axes.tensor} x pipeline {axes.pipeline} x data {estimate.data_ranks}",
        "vocabSize": vocab,
        "paddedVocabSize": padded_vocab(vocab),
        "parameters": estimate.parameters,
        "tokens": estimate.steps * estimate.tokens_per_step,
        "tokensPerParameter": round(estimate.tokens_per_parameter, 2),
        "steps": estimate.steps,
        "tokensPerStep": estimate.tokens_per_step,
        "flops": estimate.flops,
        "stateBytesPerRank": estimate.state_bytes_per_rank,
    }


def _vocab_size(run: TrainingRun) -> int:
    """What the run's tokenizer stage asks for; an imported one is only known once it is read."""
    trained = [
        s.tokenizer.vocab_size for s in run.spec.stages if s.tokenizer is not None and s.tokenizer.import_ is None
    ]
    return trained[0] if trained else _DEFAULT_VOCAB


def table(name: str, rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    out = Table(title=f"{name}: what a run would do", title_justify="left")
    for column in ("stage", "kind", "action", "nodes", "ranks", "what it needs"):
        out.add_column(column)
    for row in rows:
        out.add_row(row["stage"], row["kind"], row["action"], str(row["nodes"]), str(row["ranks"]), _prose(row))
    return out


def _prose(row: dict[str, Any]) -> str:
    if "parameters" not in row:
        return ""
    return (
        f"{row['layout']}; {people_count(row['parameters'])} parameters, {people_count(row['tokens'])} tokens "
        f"({row['tokensPerParameter']:.1f} a parameter; about 20 is compute-optimal), {row['steps']} steps of "
        f"{people_count(row['tokensPerStep'])} tokens, {row['flops']:.2e} FLOPs, "
        f"{people_count(row['stateBytesPerRank'])}B of state a rank, activations on top"
    )
