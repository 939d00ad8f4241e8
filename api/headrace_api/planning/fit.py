"""What a run needs against what its ranks have: a gang whose state is larger than its memory dies in its first minute.

Only the state is held against a device: activations are an estimate, and what fits by it alone is not refused.
"""

from headrace_api.base import FieldError
from headrace_api.people import people_bytes
from headrace_api.planning.cost import estimate_pretrain
from headrace_api.run import Stage, TrainingRun
from headrace_api.stages import Pretrain

_SMALLEST_VOCAB = 1
"""Of an imported tokenizer, which is not known before it is read."""


def vocab_size(run: TrainingRun, pretrain: Pretrain) -> int | None:
    """Tokens of the vocabulary that a stage trains on, as its tokenizer stage asks for; None if it is imported."""
    stages = {stage.name: stage for stage in run.spec.stages}
    shards = stages[pretrain.from_.shards].shards
    assert shards is not None, "references are checked when a run is parsed"
    tokenizer = stages[shards.from_.tokenizer].tokenizer
    assert tokenizer is not None, "references are checked when a run is parsed"
    return tokenizer.vocab_size if tokenizer.import_ is None else None


def state_bytes(run: TrainingRun, stage: Stage) -> int:
    """What a rank of a pretrain stage must hold at least, in bytes; 0 for other stages."""
    if stage.pretrain is None:
        return 0
    return estimate_pretrain(
        stage.pretrain,
        num_ranks=stage.compute.world,
        vocab_size=vocab_size(run, stage.pretrain) or _SMALLEST_VOCAB,
        on_gpus=stage.compute.gpus_per_node > 0,
    ).state_bytes_per_rank


def device_errors(run: TrainingRun, *, gpu_memory: int | None) -> list[FieldError]:
    """Stages whose state is larger than the memory that they ask for.

    Args:
        run: the run.
        gpu_memory: bytes of one GPU, where they are known.
    """
    errors = []
    for i, stage in enumerate(run.spec.stages):
        needed, compute = state_bytes(run, stage), stage.compute
        if compute.gpus_per_node and gpu_memory is not None and needed > gpu_memory:
            errors.append(_too_large(i, "pretrain.parallelism", needed, f"a GPU has {people_bytes(gpu_memory)}"))
        elif not compute.gpus_per_node and compute.memory is not None and needed * compute.ranks > compute.memory:
            has = f"its {compute.ranks} ranks share {people_bytes(compute.memory)}"
            errors.append(_too_large(i, "compute.memory", needed, has))
    return errors


def _too_large(i: int, field: str, needed: int, has: str) -> FieldError:
    remedy = f"weights, gradients and optimizer take {people_bytes(needed)} a rank, and {has}; {_SMALLER}"
    return FieldError(f"spec.stages[{i}].{field}", None, remedy)


_SMALLER = "split the model over more ranks (parallelism), add data ranks, or take a smaller model"
