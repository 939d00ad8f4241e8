"""What a run needs against what its ranks have: a gang whose state is larger than its memory dies in its first minute.

Only the state is held against a device: activations are an estimate, and what fails by it alone is not refused.
"""

from headrace_api.base import FieldError
from headrace_api.people import people_bytes
from headrace_api.planning.cost import PretrainEstimate, estimate_pretrain
from headrace_api.run import Stage, TrainingRun
from headrace_api.stages import Pretrain

_SMALLEST_VOCAB = 1
"""Of an imported tokenizer, which is not known before it is read."""
_SMALLER = "split the model over more ranks (parallelism), add data ranks, or take a smaller model"


def vocab_size(run: TrainingRun, pretrain: Pretrain) -> int | None:
    """Tokens of the vocabulary that a stage trains on, as its tokenizer stage asks for; None if it is imported."""
    stages = {stage.name: stage for stage in run.spec.stages}
    shards = stages[pretrain.from_.shards].shards
    assert shards is not None, "references are checked when a run is parsed"
    tokenizer = stages[shards.from_.tokenizer].tokenizer
    assert tokenizer is not None, "references are checked when a run is parsed"
    return tokenizer.vocab_size if tokenizer.import_ is None else None


def least_estimate(run: TrainingRun, stage: Stage, *, on_gpus: bool) -> PretrainEstimate | None:
    """What a pretrain stage needs at least, if its vocabulary is not known yet; None for other stages."""
    if stage.pretrain is None:
        return None
    vocab = vocab_size(run, stage.pretrain) or _SMALLEST_VOCAB
    return estimate_pretrain(stage.pretrain, num_ranks=stage.compute.world, vocab_size=vocab, on_gpus=on_gpus)


def device_errors(run: TrainingRun, *, gpu_memory: int | None) -> list[FieldError]:
    """Stages whose state is larger than the memory that they ask for.

    Args:
        run: the run.
        gpu_memory: bytes of one GPU, where they are known.
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
    """The refusal of a state that is larger than a memory.

    Args:
        field: where the memory is asked for, or the layout.
        needed: bytes of state of a rank.
        has: what there is, as people say it.
    """
    needs = f"weights, gradients and optimizer take {people_bytes(needed)} a rank"
    return FieldError(field, None, f"{needs}, and {has}; {_SMALLER}")
