"""The parts of an rl stage.

In: a ``StageContext`` with a model, and perhaps a reward model. Out: in ``ctx.output``, the model, its history, the
tokenizer, and answers of the last iteration; the final figures as metrics.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson

from headrace_api.stages import Rl
from headrace_api.stages.rl import Algorithm, GrpoLoss
from headrace_trainer.engine.advantages import Credit, Worth
from headrace_trainer.engine.assembly import Task, build_loop
from headrace_trainer.engine.checkpoint.state import load_weights
from headrace_trainer.engine.device.megatron import MegatronModule
from headrace_trainer.engine.finetune import Start, num_steps, run_finetune
from headrace_trainer.engine.loop import Loop
from headrace_trainer.engine.losses import Aggregation, KlEstimator
from headrace_trainer.engine.model.build import Head, build_model
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.engine.policy import PolicyGradient, ProximalPolicy, Ratio, Rule
from headrace_trainer.errors import UserError
from headrace_trainer.formats.chat.tokens import load
from headrace_trainer.formats.model_card import CHECKPOINT_FOLDER, TOKENIZER_FOLDER, read_card
from headrace_trainer.formats.packs import Packing, PackOrder
from headrace_trainer.formats.records import PROMPT_SHAPES
from headrace_trainer.formats.units import Units
from headrace_trainer.rules import check_columns, check_rule
from headrace_trainer.stage import StageContext
from headrace_trainer.stages.rl.answers import Answer
from headrace_trainer.stages.rl.judges import Judge, ModelJudge, RuleJudge
from headrace_trainer.stages.rl.rollouts import Parts, Rollouts

ANSWERS_FILE = "answers.md"
_SHOWN = 10


def run_rl(ctx: StageContext) -> dict[str, float]:
    """Train a model on its own answers. Every rank of the gang calls; see ``run_finetune``.

    Raises:
        UserError: also where a figure went too far.
    """
    config = ctx.config
    assert isinstance(config, Rl)

    def measure(loop: Loop, start: Start) -> dict[str, float]:
        rollouts = loop.hooks
        assert isinstance(rollouts, Rollouts)
        if loop.gang.is_first and rollouts.answers:
            (ctx.output / ANSWERS_FILE).write_text("\n".join(_shown(config, rollouts.answers, start.tokenizer)))
        return _figures(loop)

    # The last token of an answer is not read by the model, so it needs no position.
    room = config.max_new_tokens - 1
    return run_finetune(ctx, allowed=PROMPT_SHAPES, build=build_rl, measure=measure, room=room)


def check_rewards(config: Rl, prompts: Units) -> None:
    """Refuse rules that cannot be used with these prompts.

    Raises:
        UserError: which, and why.
    """
    for rule in (reward.rule for reward in config.rewards if reward.rule is not None):
        check_rule(rule, field="rl.rewards")
        for number in range(len(prompts)):
            check_columns(rule, orjson.loads(prompts.note(number)), place=f"prompt {number}", field="rl.rewards")


def build_rl(ctx: StageContext, gang: Gang, start: Start) -> Loop:
    """The loop before its first step."""
    config = ctx.config
    assert isinstance(config, Rl)
    seed, critic = ctx.resolved.seed, config.algorithm is Algorithm.PPO
    units = start.dataset.train
    check_rewards(config, units)
    order = PackOrder(
        units.lengths, capacity=config.sequence_length, seed=seed, packing=Packing.NONE, shares=start.dataset.shares
    )
    held = config.kl.coefficient > 0 or config.rails.max_kl is not None
    parts = Parts(
        prompts=units,
        order=order,
        judges=tuple(_judges(ctx, gang, start)),
        reference=start.build(gang, config, seed=seed).eval() if held else None,
        worth=worth_of(config),
        stop_tokens=frozenset(start.card.stop_ids),
        seed=seed,
    )
    rollouts = Rollouts(config, gang, parts)
    head = Head.LANGUAGE_MODEL_AND_VALUE if critic else Head.LANGUAGE_MODEL
    whole = config.steps_per_iteration
    task = Task(
        config=config,
        steps=-(-num_steps(config, rollouts) // whole) * whole,
        card=start.card,
        objective=_objective(config, fixed=gang.layout.pipeline > 1),
        training=rollouts,
        validation=None,
        head=head,
        fill=lambda model: start.fill(model, seed=seed, head=head),
        hooks=rollouts,
        data=start.digest,
    )
    return build_loop(ctx, gang, task)


def worth_of(config: Rl) -> Worth:
    """How rewards are spread."""
    credits = {
        Algorithm.GRPO: Credit.GROUP_UNSCALED if config.loss is GrpoLoss.DR_GRPO else Credit.GROUP,
        Algorithm.RLOO: Credit.OTHERS,
        Algorithm.PPO: Credit.VALUE,
    }
    return Worth(
        credit=credits[config.algorithm],
        group_size=config.group_size,
        estimator=KlEstimator(config.estimator),
        gamma=config.ppo.gamma,
        lam=config.ppo.lam,
        missing_eos_penalty=config.ppo.missing_eos_penalty,
        whiten_rewards=config.ppo.whiten_rewards,
    )


def _objective(config: Rl, *, fixed: bool) -> PolicyGradient:
    ratio, aggregation = _weighing(config)
    rule = Rule(
        ratio=ratio,
        aggregation=aggregation,
        clip_low=config.clip.low,
        clip_high=config.clip.high,
        estimator=KlEstimator(config.estimator),
        temperature=config.temperature,
        longest=config.max_new_tokens,
    )
    if config.algorithm is not Algorithm.PPO:
        return PolicyGradient(rule, fixed=fixed)
    return ProximalPolicy(
        rule, value_coefficient=config.ppo.value_coefficient, value_clip=config.clip.value, fixed=fixed
    )


def _weighing(config: Rl) -> tuple[Ratio, Aggregation]:
    if config.algorithm is Algorithm.PPO:
        return Ratio.TOKEN, Aggregation.TOKEN
    if config.algorithm is Algorithm.RLOO:
        return Ratio.SUM, Aggregation.SEQUENCE
    return {
        GrpoLoss.GRPO: (Ratio.TOKEN, Aggregation.SEQUENCE),
        GrpoLoss.DAPO: (Ratio.TOKEN, Aggregation.TOKEN),
        GrpoLoss.DR_GRPO: (Ratio.TOKEN, Aggregation.CONSTANT),
        GrpoLoss.GSPO: (Ratio.MEAN, Aggregation.SEQUENCE),
    }[config.loss]


def _judges(ctx: StageContext, gang: Gang, start: Start) -> Iterator[Judge]:
    config = ctx.config
    assert isinstance(config, Rl)
    decides = gang.tensor_rank == 0 and gang.is_first_stage
    for reward in config.rewards:
        if reward.rule is not None:
            yield RuleJudge(rule=reward.rule, tokenizer=load(start.tokenizer), decides=decides)
        if reward.model is not None:
            yield ModelJudge(
                model=_reward_model(ctx.input("reward"), gang, config, start),
                clip=reward.model.clip,
                length=config.sequence_length,
                device=gang.device,
            )


def _reward_model(folder: Path, gang: Gang, config: Rl, start: Start) -> MegatronModule:
    """The reward model, on the ranks that train.

    Raises:
        UserError: its tokens are others than the policy's.
    """
    ours, theirs = load(start.tokenizer).get_vocab(), load(folder / TOKENIZER_FOLDER).get_vocab()
    if ours != theirs:
        different = sum(ours.get(token) != i for token, i in theirs.items()) + len(set(ours) - set(theirs))
        raise UserError(
            f"rl.from.reward: its tokenizer differs from the model's in {different:,} tokens: train the reward model "
            "from the model that rl starts from, with the same chatTemplate"
        )
    card = read_card(folder)
    model = build_model(
        card.architecture,
        gang=gang,
        vocab_size=card.vocab_size,
        sequence_length=config.sequence_length,
        precision=card.precision,
        head=Head.SCALAR,
    )
    load_weights(model, folder / CHECKPOINT_FOLDER)
    return model.eval()


def _figures(loop: Loop) -> dict[str, float]:
    """What the last iterations came to."""
    shown = {"reward": "reward", "completions/mean_length": "answerTokens", "objective/kl": "kl", "entropy": "entropy"}
    newest = next((r for r in reversed(loop.history.records) if "reward" in r), {})
    return {name: newest[figure] for figure, name in shown.items() if figure in newest}


def _shown(config: Rl, answers: list[Answer], tokenizer: Path) -> Iterator[str]:
    """Answers of the last iteration as Markdown, with what each reward said."""
    codec = load(tokenizer)
    names = [reward.name for reward in config.rewards]
    yield "# Answers of the last iteration\n"
    for i in range(0, len(answers), max(1, len(answers) // _SHOWN)):
        answer = answers[i]
        scores = ", ".join(f"{name} {score:g}" for name, score in zip(names, answer.scores, strict=True))
        text = codec.decode(np.concatenate([answer.prompt, answer.tokens]).tolist(), clean_up_tokenization_spaces=False)
        yield f"### Answer {i}: {scores}; {len(answer.tokens)} tokens\n\n~~~~text\n{text}\n~~~~\n"
