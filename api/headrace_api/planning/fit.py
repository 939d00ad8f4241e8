"""Check whether a run's state fits its ranks' memory. A gang that is too large would die in its first minute.

Only the state is checked: activations are an estimate, which alone is no reason to refuse a run.
"""

from headrace_api.base import FieldError
from headrace_api.people import people_bytes
from headrace_api.planning.cost import PretrainEstimate, estimate_pretrain
from headrace_api.run import Stage, TrainingRun
from headrace_api.stages import Pretrain

_SMALLEST_VOCAB = 1
"""For an imported tokenizer, whose size is unknown until it is read."""
_SMALLER = "split the model over more ranks (parallelism), add data ranks, or choose a smaller model"


def vocab_size(run: TrainingRun, pretrain: Pretrain) -> int | None:
    """Vocabulary size of a stage's tokenizer, as requested; None if the tokenizer is imported."""
    stages = {stage.name: stage for stage in run.spec.stages}
    shards = stages[pretrain.from_.shards].shards
    assert shards is not None, "references are checked when a run is parsed"
    tokenizer = stages[shards.from_.tokenizer].tokenizer
    assert tokenizer is not None, "references are checked when a run is parsed"
    return tokenizer.vocab_size if tokenizer.import_ is None else None


def least_estimate(run: TrainingRun, stage: Stage, *, on_gpus: bool) -> PretrainEstimate | None:
    """The minimum that a pretrain stage needs, while its vocabulary size may be unknown; None for other stages."""
    if stage.pretrain is None:
        return None
    vocab = vocab_size(run, stage.pretrain) or _SMALLEST_VOCAB
    return estimate_pretrain(stage.pretrain, num_ranks=stage.compute.world, vocab_size=vocab, on_gpus=on_gpus)


def device_errors(run: TrainingRun, *, gpu_memory: int | None) -> list[FieldError]:
    """Stages whose state exceeds the memory they ask for.

    Args:
        run: the run.
        gpu_memory: bytes of one GPU, if known.
    """
    errors = []
    for i, stage in enumerate(run.spec.stages):
        compute, field = stage.compute, f"spec.stages[{i}]"
        estimate = least_estimate(run, stage, on_gpus=compute.gpus_per_node > 0)
        if estimate is None:
            continue
        needed = estimate.state_bytes_per_rank
        if compute.gpus_per_node and gpu_memory is not None and needed > gpu_memory:
            errors.append(too_large(f"{field}.pretrain.parallelism", needed, f"a GPU has {people_bytes(gpu_memory)}"))
        elif not compute.gpus_per_node and compute.memory is not None and needed * compute.ranks > compute.memory:
            has = f"its {compute.ranks} ranks share {people_bytes(compute.memory)}"
            errors.append(too_large(f"{field}.compute.memory", needed, has))
    return errors


def too_large(field: str, needed: int, has: str) -> FieldError:
    """The error for a state that exceeds a memory.

    Args:
        field: the field that asks for the memory, or the layout.
        needed: bytes of state per rank.
        has: what is available, as prose.
    """
    needs = f"weights, gradients and optimizer state take {people_bytes(needed)} per rank"
    return FieldError(field, None, f"{needs}, but {has}; {_SMALLER}")
