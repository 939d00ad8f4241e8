"""References between stages: what ``from`` may name, and what a later stage requires of the model it names.

Each check exists twice, for this process and as CEL for the API server; ``tests/operator/test_real_admission.py``
compares the two.
"""

from collections.abc import Iterator, Mapping, Sequence

from headrace_api.base import FieldError, JsonSchema, rule
from headrace_api.compute import cel_world
from headrace_api.model import Architecture, cel_dimension
from headrace_api.parallelism import MAX_TENSOR, SPLIT_BY_TENSOR, Parallelism, split_model
from headrace_api.stage import Stage
from headrace_api.stages import KINDS, ArtifactKind, Finetune, StartsFromModel
from headrace_api.stages.deploy import Engine

MAX_STAGES = 32
_PLACES = f"[{', '.join(str(i) for i in range(MAX_STAGES))}]"
"""CEL's list macros give no indices; a list of indices does."""
_STARTING = [kind for kind, config in KINDS.items() if issubclass(config, StartsFromModel)]
_VLLM = "vllm splits the heads over its GPUs"


def check_references(stages: Sequence[Stage]) -> None:
    """Validate names and references.

    Raises:
        FieldError: a duplicate name, an unsuitable input, or ranks that do not divide the model.
    """
    seen: dict[str, Stage] = {}
    for i, stage in enumerate(stages):
        if stage.name in seen:
            raise FieldError(f"stages[{i}].name", stage.name, "is used twice; names must be unique in a run")
        for slot, source in stage.config.inputs().items():
            _check_input(i, stage, slot=slot, source=source, seen=seen)
        field = f"stages[{i}].compute.{stage.compute.ranks_field}"
        if stage.evaluate is not None:
            _check_evaluate(field, stage, arch=architecture_of(stage.evaluate.from_.model, seen))
        if isinstance(stage.config, StartsFromModel) and stage.config.model_stage is not None:
            arch = architecture_of(stage.config.model_stage, seen)
            _check_split(f"stages[{i}].{stage.kind}", stage.config, arch=arch)
        if stage.deploy is not None and stage.deploy.engine is Engine.VLLM:
            _check_vllm(f"stages[{i}].compute.gpusPerNode", stage, exported=seen[stage.deploy.from_.model], seen=seen)
        seen[stage.name] = stage


def reference_rules() -> Iterator[JsonSchema]:
    """The same checks as CEL, for the block that holds ``stages``. The list type makes names unique."""
    yield from _input_rules()
    world = cel_world("s")
    yield rule(
        f"self.stages.all(s, !has(s.evaluate) || {world} <= {MAX_TENSOR})",
        f"compute.ranksPerNode of an evaluate stage must be at most {MAX_TENSOR}",
    )
    for dimension in SPLIT_BY_TENSOR:
        yield _split_rule(dimension, by=_of_readers("1", evaluate=world, others="parallelism.tensor"))
    yield _split_rule("layers", by=_of_readers("1", evaluate="1", others="parallelism.pipeline"))
    yield _vllm_rule()


def _of_readers(otherwise: str, *, evaluate: str, others: str) -> str:
    """CEL that picks, for a stage ``s`` that reads a checkpoint, a value by its kind."""
    chosen = otherwise
    for kind in _STARTING:
        chosen = f"has(s.{kind}){_only_if_set(kind, others)} ? s.{kind}.{others} : {chosen}"
    return f"(has(s.evaluate) ? {evaluate} : {chosen})"


def _only_if_set(kind: str, field: str) -> str:
    """What CEL asks before it reads a field of a stage that may have been left out."""
    return f" && has(s.{kind}.from) && has(s.{kind}.{field})" if field.startswith("from.") else ""


def _split_rule(dimension: str, *, by: str) -> JsonSchema:
    """Ranks divide a dimension of the model that they read, where it comes from pretraining; of models that were trained
    further the operator knows the dimensions."""
    source = _of_readers("''", evaluate="s.evaluate.from.model", others="from.model")
    divides = f"{cel_dimension(dimension, model='t.pretrain.model')} % {by} == 0"
    return rule(
        f"self.stages.all(s, self.stages.all(t, t.name != {source} || !has(t.pretrain) || {divides}))",
        f"the ranks that share the model of an evaluate, {' or '.join(_STARTING)} stage must divide its {dimension}: "
        "choose another compute.ranksPerNode or parallelism",
    )


def architecture_of(name: str, stages: Mapping[str, Stage]) -> Architecture | None:
    """The dimensions of the model that a stage gives: those of the stage that it was first trained in.

    None if it was trained elsewhere: only the trainer, which reads its config.json, knows them and checks them.

    Args:
        name: of a stage that gives a checkpoint.
        stages: every earlier stage, by name; references between them are checked.
    """
    stage = stages[name]
    if stage.pretrain is not None:
        return stage.pretrain.model.architecture
    assert isinstance(stage.config, Finetune), "a checkpoint comes from training"
    if stage.config.model_stage is None:
        return None
    return architecture_of(stage.config.model_stage, stages)


def _check_input(i: int, stage: Stage, *, slot: str, source: str, seen: dict[str, Stage]) -> None:
    field, (wanted, _) = f"stages[{i}].{stage.kind}.from.{slot}", stage.config.slots()[slot]
    fitting = [name for name, other in seen.items() if wanted == other.config.GIVES]
    remedy = f"use {' or '.join(fitting)}" if fitting else f"add an earlier stage that produces a {wanted}"
    if source not in seen:
        raise FieldError(field, source, f"no earlier stage has this name; {remedy}")
    if wanted != seen[source].config.GIVES:
        gives = seen[source].config.GIVES
        raise FieldError(
            field, source, f"is a {seen[source].kind} stage, which produces a {gives}, not a {wanted}; {remedy}"
        )


def _input_rules() -> Iterator[JsonSchema]:
    """Every ``from`` names an earlier stage that produces the right kind of artifact."""
    givers = {gives: [k for k, c in KINDS.items() if gives == c.GIVES] for gives in ArtifactKind}
    for kind, config in KINDS.items():
        for slot, (wanted, optional) in config.slots().items():
            reader = f"self.stages[i].{kind}"
            unset = "".join(f" || !has({reader}.{field})" for field in optional)
            given = " || ".join(f"has(self.stages[j].{giver})" for giver in givers[wanted])
            found = f"j < i && self.stages[j].name == {reader}.from.{slot} && ({given})"
            yield rule(
                f"{_PLACES}.all(i, i >= size(self.stages) || !has({reader}){unset} || {_PLACES}.exists(j, {found}))",
                f"{kind}.from.{slot} must name an earlier {' or '.join(givers[wanted])} stage",
            )


def _check_split(field: str, config: StartsFromModel, *, arch: Architecture | None) -> None:
    if arch is None:
        return
    try:
        split_model(config.parallelism, arch)
    except FieldError as error:
        raise FieldError(f"{field}.{error.field}", error.value, error.remedy) from error


def _check_evaluate(field: str, stage: Stage, *, arch: Architecture | None) -> None:
    """An evaluate stage splits its model over its ranks; it uses no other axis."""
    ranks = stage.compute.ranks
    if ranks > MAX_TENSOR:
        raise FieldError(field, ranks, f"an evaluate stage splits the model over its ranks; use at most {MAX_TENSOR}")
    if arch is None:
        return
    try:
        split_model(Parallelism(tensor=ranks), arch)
    except FieldError as error:
        raise FieldError(field, ranks, f"an evaluate stage splits the model over its ranks: {error.remedy}") from error


def _check_vllm(field: str, stage: Stage, *, exported: Stage, seen: Mapping[str, Stage]) -> None:
    """vLLM's tensor parallelism splits heads; it splits key heads too, or repeats them if there are fewer than GPUs."""
    gpus = stage.compute.gpus_per_node
    assert exported.export is not None, "only export produces a Hugging Face folder"
    arch = architecture_of(exported.export.from_.model, seen)
    if arch is not None and gpus and not _vllm_splits(arch, gpus):
        fitting = [d for d in range(1, arch.heads + 1) if _vllm_splits(arch, d)]
        remedy = f"{_VLLM}: {arch.heads} heads and {arch.kv_heads} kvHeads; use {' or '.join(map(str, fitting))}"
        raise FieldError(field, gpus, remedy)


def _vllm_splits(arch: Architecture, gpus: int) -> bool:
    fewer, more = sorted((arch.kv_heads, gpus))
    return arch.heads % gpus == 0 and more % fewer == 0


def _vllm_rule() -> JsonSchema:
    heads, keys = (cel_dimension(name, model="t.pretrain.model") for name in ("heads", "kvHeads"))
    gpus = "s.compute.gpusPerNode"
    splits = f"{heads} % {gpus} == 0 && ({keys} > {gpus} ? {keys} % {gpus} == 0 : {gpus} % {keys} == 0)"
    trained = f"self.stages.all(t, t.name != e.export.from.model || !has(t.pretrain) || ({splits}))"
    exported = f"self.stages.all(e, e.name != s.deploy.from.model || !has(e.export) || {trained})"
    return rule(
        f"self.stages.all(s, !has(s.deploy) || s.deploy.engine != 'vllm' || {gpus} < 2 || {exported})",
        f"{_VLLM}: compute.gpusPerNode must divide them, and divide the kvHeads or be a multiple of them",
    )
