"""Check whether a run's state fits its ranks' memory. A gang that is too large would die in its first minute.

Only the state is checked: activations are an estimate, which alone is no reason to refuse a run.
"""

from headrace_api.base import FieldError
from headrace_api.people import people_bytes
from headrace_api.planning.cost import Estimate, adapter_of, estimate_training
from headrace_api.references import architecture_of
from headrace_api.run import Stage, TrainingRun
from headrace_api.stages import Finetune, Pretrain, Training

_SMALLEST_VOCAB = 1
"""For an imported tokenizer, whose size is unknown until it is read."""
_SPLIT = "split the model over more ranks (parallelism), add data ranks"


def vocab_size(run: TrainingRun, training: Training) -> int | None:
    """Vocabulary size of a training stage's tokenizer, as requested; None if the tokenizer or the model is imported.

    A chat template may add a few tokens.
    """
    stages = {stage.name: stage for stage in run.spec.stages}
    while isinstance(training, Finetune):
        if training.model_stage is None:
            return None
        before = stages[training.model_stage].training
        assert before is not None, "references are checked when a run is parsed"
        training = before
    assert isinstance(training, Pretrain), "every model was pretrained first"
    shards = stages[training.from_.shards].shards
    assert shards is not None, "references are checked when a run is parsed"
    tokenizer = stages[shards.from_.tokenizer].tokenizer
    assert tokenizer is not None, "references are checked when a run is parsed"
    return tokenizer.vocab_size if tokenizer.import_ is None else None


def least_estimate(run: TrainingRun, stage: Stage, *, on_gpus: bool) -> Estimate | None:
    """The minimum that a training stage needs, while its vocabulary size may be unknown; None for other stages, and for
    models that were trained elsewhere, whose dimensions are unknown."""
    if stage.training is None:
        return None
    vocab = vocab_size(run, stage.training) or _SMALLEST_VOCAB
    arch = architecture_of(stage.name, {s.name: s for s in run.spec.stages})
    if arch is None:
        return None
    return estimate_training(stage.training, arch, num_ranks=stage.compute.world, vocab_size=vocab, on_gpus=on_gpus)


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
            errors.append(
                too_large(f"{field}.{stage.kind}.parallelism", stage, needed, f"a GPU has {people_bytes(gpu_memory)}")
            )
        elif not compute.gpus_per_node and compute.memory is not None and needed * compute.ranks > compute.memory:
            has = f"its {compute.ranks} ranks share {people_bytes(compute.memory)}"
            errors.append(too_large(f"{field}.compute.memory", stage, needed, has))
    return errors


def too_large(field: str, stage: Stage, needed: int, has: str) -> FieldError:
    """The error for a state that exceeds a memory.

    Args:
        field: the field that asks for the memory, or the layout.
        stage: the training stage.
        needed: bytes of state per rank.
        has: what is available, as prose.
    """
    needs = f"weights, gradients and optimizer state take {people_bytes(needed)} per rank"
    can_adapt = isinstance(stage.training, Finetune) and adapter_of(stage.training) is None
    remedies = [_SPLIT, *(["train only an adapter (adapter.lora)"] if can_adapt else []), "or choose a smaller model"]
    return FieldError(field, None, f"{needs}, but {has}; {', '.join(remedies)}")
