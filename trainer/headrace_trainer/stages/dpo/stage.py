"""The parts of a dpo stage.

In: a ``StageContext`` with a model. Out: in ``ctx.output``, the model, its history, the tokenizer and the reference
log-probabilities; the final figures as metrics.
"""

from dataclasses import dataclass

from headrace_api.stages import Dpo
from headrace_api.stages.dpo import DpoLoss
from headrace_trainer.engine.assembly import Task, build_loop
from headrace_trainer.engine.batches import Samples
from headrace_trainer.engine.finetune import Start, num_steps, run_finetune
from headrace_trainer.engine.hooks import Hooks
from headrace_trainer.engine.loop import Loop
from headrace_trainer.engine.losses import Preference
from headrace_trainer.engine.objective import Objective
from headrace_trainer.engine.packs import PackSamples, packs_of
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.engine.preference import MarginPreference, OddsRatioPreference, PairPreference
from headrace_trainer.engine.unpaired import ReferencePoint, UnpairedPreference
from headrace_trainer.errors import UserError
from headrace_trainer.formats.records import KTO_SHAPES, PAIR_SHAPES
from headrace_trainer.stage import StageContext
from headrace_trainer.stages.dpo.reference import Reference, ReferencedSamples


def run_dpo(ctx: StageContext) -> dict[str, float]:
    """Train a model on answers that are preferred or not. Every rank of the gang calls; see ``run_finetune``."""
    config = ctx.config
    assert isinstance(config, Dpo)
    allowed = KTO_SHAPES if config.loss is DpoLoss.KTO else PAIR_SHAPES
    return run_finetune(ctx, allowed=allowed, build=build_dpo, measure=_held_out)


def _held_out(loop: Loop, _: Start) -> dict[str, float]:
    """Accuracy and mean margin of the implicit rewards; nothing without held-out records."""
    found = {
        name: loop.history.held_out(figure)
        for name, figure in (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins"))
    }
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class _Learned:
    """What is minimized, on which samples."""

    objective: Objective
    training: Samples
    validation: Samples | None
    hooks: Hooks


def build_dpo(ctx: StageContext, gang: Gang, start: Start) -> Loop:
    """The loop before its first step."""
    config = ctx.config
    assert isinstance(config, Dpo)
    training, validation = packs_of(start.dataset, config, seed=ctx.resolved.seed)
    steps, fixed = num_steps(config, training), gang.layout.pipeline > 1
    if config.loss is DpoLoss.KTO:
        learned = _from_labels(Reference(ctx, gang, start), config, gang, start, training, validation, steps=steps)
    elif config.loss.needs_reference:
        learned = _from_pairs(Reference(ctx, gang, start), config, training, validation, fixed=fixed)
    else:
        objective = _free_of_reference(config, fixed=fixed)
        learned = _Learned(objective=objective, training=training, validation=validation, hooks=Hooks())
    task = Task(
        config=config,
        steps=steps,
        card=start.card,
        objective=learned.objective,
        training=learned.training,
        validation=learned.validation,
        hooks=learned.hooks,
        fill=lambda model: start.fill(model, seed=ctx.resolved.seed),
        data=start.digest,
    )
    return build_loop(ctx, gang, task)


def _free_of_reference(config: Dpo, *, fixed: bool) -> Objective:
    if config.loss is DpoLoss.SIMPO:
        gamma = 1.0 if config.gamma is None else config.gamma
        return MarginPreference(beta=config.strength, gamma=gamma, fixed=fixed)
    return OddsRatioPreference(beta=config.strength, fixed=fixed)


def _from_pairs(
    reference: Reference, config: Dpo, training: PackSamples, validation: PackSamples | None, *, fixed: bool
) -> _Learned:
    found = reference.documents(each=2)
    objective = PairPreference(
        kind=Preference(config.loss),
        beta=config.strength,
        label_smoothing=config.label_smoothing,
        by_length=config.length_normalized,
        fixed=fixed,
    )
    return _Learned(
        objective=objective,
        training=ReferencedSamples(training, found.train),
        validation=ReferencedSamples(validation, found.validation) if validation is not None else None,
        hooks=Hooks(),
    )


def _from_labels(
    reference: Reference,
    config: Dpo,
    gang: Gang,
    start: Start,
    training: PackSamples,
    validation: PackSamples | None,
    *,
    steps: int,
) -> _Learned:
    _check_both_kinds(start)
    found = reference.documents(each=1)
    mismatches = reference.mismatches(training, validation, steps=steps)
    objective = UnpairedPreference(
        beta=config.strength,
        wanted_weight=config.desirable_weight or 1.0,
        unwanted_weight=config.undesirable_weight or 1.0,
        fixed=gang.layout.pipeline > 1,
    )
    hooks = ReferencePoint(
        objective,
        training=training,
        held_out=validation,
        reference=mismatches,
        batch_size=config.global_batch_size,
        length=config.sequence_length,
        gang=gang,
    )
    return _Learned(
        objective=objective,
        training=ReferencedSamples(training, found.train),
        validation=ReferencedSamples(validation, found.validation) if validation is not None else None,
        hooks=hooks,
    )


def _check_both_kinds(start: Start) -> None:
    """KTO learns from what differs between wanted and unwanted answers.

    Raises:
        UserError: there is only one kind.
    """
    unwanted, wanted = start.dataset.train.num_labelled
    if not unwanted or not wanted:
        there, missing = ("true", "false") if wanted else ("false", "true")
        raise UserError(
            f"dpo.data: all {max(unwanted, wanted):,} examples have the label {there}: kto needs some with the label "
            f"{missing}; add them, or use sft"
        )
