"""The rl stage: a model, prompts and a reward -> a model whose answers are rewarded more."""

from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from headrace_api.base import FieldError, Part, Spec, api_rules, rule
from headrace_api.stages.base import ArtifactKind, StageName
from headrace_api.stages.data import Records
from headrace_api.stages.finetune import ORIGIN_RULE, Finetune, ModelInputs, Sampled
from headrace_api.stages.rules import RuleReward
from headrace_api.stages.training import Optimizer, Schedule


class RlInputs(ModelInputs):
    """What the stage starts from, and what judges its answers."""

    ACCEPTS: ClassVar[dict[str, ArtifactKind]] = ModelInputs.ACCEPTS | {"reward": ArtifactKind.REWARD}

    reward: StageName | None = None
    """reward names the reward stage whose model scores answers, where rewards has a model."""


class Algorithm(StrEnum):
    """How rewards become advantages."""

    GRPO = "grpo"
    """Against the mean of the answers to one prompt: arXiv 2402.03300."""
    RLOO = "rloo"
    """Against the mean of the other answers to one prompt, an answer being one action: arXiv 2402.14740."""
    PPO = "ppo"
    """Token by token against a value that is learned as well: arXiv 1707.06347."""


class GrpoLoss(StrEnum):
    """How grpo weighs tokens, and what it clips."""

    GRPO = "grpo"
    """Every answer weighs the same: arXiv 2402.03300."""
    DAPO = "dapo"
    """Every token weighs the same: arXiv 2503.14476."""
    DR_GRPO = "dr_grpo"
    """Every token weighs 1 / maxNewTokens, and advantages keep their scale: arXiv 2503.20783."""
    GSPO = "gspo"
    """Ratios of whole answers are clipped: arXiv 2507.18071."""


class Estimator(StrEnum):
    """How the divergence from the starting model is estimated from one token: Schulman, "Approximating KL divergence"."""

    K1 = "k1"
    K2 = "k2"
    K3 = "k3"


_TARGET = "adapts a coefficient; set coefficient above 0, or leave target out"


class Divergence(Spec):
    """How strongly the model is held to the one that it starts from."""

    model_config = api_rules(rule("!has(self.target) || double(self.coefficient) > 0.0", f"target {_TARGET}"))

    coefficient: float = Field(0.0, ge=0, le=100)
    """coefficient is the weight of the KL divergence; 0 leaves it out, and no second model is held in memory."""
    estimator: Estimator | None = None
    """estimator is k1, k2 or k3; if unset, k3 in grpo's loss, and k1 in the rewards of ppo and rloo."""
    target: float | None = Field(None, gt=0, le=10_000)
    """target is the KL divergence of an answer, in nats, that the coefficient is adapted to keep (arXiv 1909.08593, section 2.2); it stays as it is if unset."""
    horizon: int = Field(10_000, ge=1, le=10**12)
    """horizon is the number of answers over which the coefficient adapts."""

    @model_validator(mode="after")
    def _target_adapts_something(self) -> Self:
        if self.target is not None and self.coefficient == 0:
            raise FieldError("target", self.target, _TARGET)
        return self


class Clipping(Spec):
    """How far one iteration may move the model."""

    low: float = Field(0.2, ge=0, lt=1)
    """low is how far the ratio of new to old probability may fall below 1."""
    high: float = Field(0.2, ge=0, le=100)
    """high is how far it may rise above 1; dapo's authors use 0.28."""
    value: float = Field(0.2, gt=0, le=1000)
    """value is how far ppo's value may move from what it was when the answers were drawn."""


class Ppo(Spec):
    """What only ppo has."""

    gamma: float = Field(1.0, ge=0, le=1)
    """gamma is the discount of a token."""
    lam: float = Field(0.95, ge=0, le=1)
    """lam is the decay of the advantage estimator, lambda of arXiv 1506.02438."""
    value_coefficient: float = Field(0.1, ge=0, le=100)
    """valueCoefficient is the weight of the value's loss; value and model share all layers but the last."""
    missing_eos_penalty: float = Field(1.0, ge=0, le=10**6)
    """missingEosPenalty is taken from the score of an answer that did not end in maxNewTokens."""
    whiten_rewards: bool = False
    """whitenRewards scales the rewards of an iteration to variance 1; advantages always are."""


class ModelReward(Spec):
    """A reward that the model of from.reward gives."""

    clip: float = Field(10.0, gt=0, le=10**6)
    """clip is the largest score, up and down."""


_ONE_REWARD = "set either rule or model"


class RewardTerm(Spec):
    """One of the rewards that are added up."""

    model_config = api_rules(rule("has(self.rule) != has(self.model)", _ONE_REWARD))

    rule: RuleReward | None = None
    """rule judges by what is known of a right answer."""
    model: ModelReward | None = None
    """model scores with the reward model of from.reward."""
    weight: float = Field(1.0, ge=-1000, le=1000)
    """weight multiplies the reward before it is added; below 0 it is a penalty."""

    @property
    def name(self) -> str:
        """What figures call it."""
        return self.rule.kind if self.rule is not None else "model"

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.rule is None) == (self.model is None):
            raise FieldError("", "both" if self.rule is not None else "none", _ONE_REWARD)
        return self


class RailAction(StrEnum):
    """What follows where a rail is left."""

    PAUSE = "pause"
    """The stage saves a checkpoint and fails, and says why; started again, it goes on from there."""
    ROLL_BACK = "rollBack"
    """The weights of the newest checkpoint from before are taken, once; should that not help, it pauses."""


class Rail(Spec):
    """A figure that must not go too far."""

    limit: float = Field(ge=0, le=10**9)
    """limit is how far."""
    then: RailAction = RailAction.PAUSE
    """then is what follows: pause or rollBack."""


class Rails(Spec):
    """Figures of an iteration that must not go too far."""

    max_kl: Rail | None = None
    """maxKl bounds the KL divergence of an answer from the starting model, in nats (objective/kl)."""
    min_entropy: Rail | None = None
    """minEntropy bounds the entropy of a token from below, in nats (entropy)."""
    max_length_share: Rail | None = None
    """maxLengthShare bounds the share of the answers that did not end in maxNewTokens (completions/clipped_ratio)."""
    max_zero_variance_share: Rail | None = None
    """maxZeroVarianceShare bounds the share of the prompts whose answers all have the same reward (frac_reward_zero_std); where all answers are right, that is 1."""
    max_mismatch: Rail | None = None
    """maxMismatch bounds the mean difference of a token's log-probability between sampling and training, in nats (train_rollout_logprob_abs_diff); about 0.01 is healthy in bf16."""


_WHOLE_BATCHES = "must divide promptsPerIteration x groupSize"
_OTHERS = "grpo and rloo compare an answer with others to the same prompt: use 2 or more, or ppo"
_ROOM = "must be below sequenceLength: prompts need room"
_REWARD_MODEL = "has a model only with from.reward, and from.reward is read only by a model in rewards"
_LOSS = "is of grpo; leave it out, or choose that algorithm"


class Rl(Finetune, Sampled):
    """Reinforcement learning: draw answers to prompts, reward them, and make rewarded ones likelier."""

    model_config = api_rules(
        ORIGIN_RULE,
        rule(
            "(self.promptsPerIteration * self.groupSize) % self.globalBatchSize == 0",
            f"globalBatchSize {_WHOLE_BATCHES}",
        ),
        rule("self.algorithm == 'ppo' || self.groupSize > 1", f"groupSize: {_OTHERS}"),
        rule("self.maxNewTokens < self.sequenceLength", f"maxNewTokens {_ROOM}"),
        rule(
            "(has(self.from) && has(self.from.reward)) == self.rewards.exists(r, has(r.model))",
            f"rewards {_REWARD_MODEL}",
        ),
        rule("self.loss == 'grpo' || self.algorithm == 'grpo'", f"loss {_LOSS}"),
    )

    KIND = "rl"
    GIVES = ArtifactKind.CHECKPOINT

    from_: RlInputs | None = Field(None, alias="from")
    """from names the model to start from, and the reward model if there is one."""
    data: Records
    """data is the prompts; their records may have other columns, such as the answer that a rule compares with."""
    epochs: Annotated[float, Part.EXTENT] = Field(1.0, gt=0, le=10_000)
    """epochs is how often each prompt is answered; the last iteration is made whole."""
    algorithm: Algorithm = Algorithm.GRPO
    """algorithm is how rewards become advantages: grpo, rloo or ppo."""
    loss: GrpoLoss = GrpoLoss.GRPO
    """loss is how grpo weighs tokens: grpo, dapo, dr_grpo or gspo."""
    rewards: list[RewardTerm] = Field(min_length=1, max_length=16)
    """rewards are added up, each with its weight."""
    prompts_per_iteration: int = Field(8, ge=1, le=2**20)
    """promptsPerIteration is the number of prompts that are answered before the model changes."""
    group_size: int = Field(8, ge=1, le=4096)
    """groupSize is the number of answers to each prompt."""
    epochs_per_iteration: int = Field(1, ge=1, le=100)
    """epochsPerIteration is how often an iteration's answers are trained on; the steps of an iteration are this times promptsPerIteration x groupSize / globalBatchSize."""
    global_batch_size: int = Field(64, ge=1, le=2**24)
    """globalBatchSize is the number of answers in a step, over all ranks."""
    max_new_tokens: int = Field(256, ge=1, le=2**20)
    """maxNewTokens is the longest answer; prompts that leave no room for it in sequenceLength are left out, and counted."""
    temperature: float = Field(1.0, gt=0, le=100)
    """temperature divides the logits, in sampling and in training."""
    answers_at_once: Annotated[int, Part.EXECUTION] = Field(64, ge=1, le=2**20)
    """answersAtOnce is the number of answers that one replica draws together; their cache must fit into memory."""
    kl: Divergence = Field(default_factory=Divergence)
    """kl holds the model to the one that it starts from."""
    clip: Clipping = Field(default_factory=Clipping)
    """clip is how far one iteration may move the model."""
    ppo: Ppo = Field(default_factory=Ppo)
    """ppo is what only ppo has."""
    max_failed_share: Annotated[float, Part.EXECUTION] = Field(0.1, ge=0, le=1)
    """maxFailedShare bounds the share of an iteration's rewards that could not be had, as a score that is not a number; below it they are counted and teach nothing."""
    rails: Annotated[Rails, Part.EXECUTION] = Field(default_factory=Rails)
    """rails bound an iteration's figures, each with what follows."""
    schedule: Schedule = Schedule(learning_rate=1e-6)
    """schedule is the learning rate over the run; learningRate is 1e-6 if the block is left out."""
    optimizer: Optimizer = Optimizer(weight_decay=0.0)
    """optimizer holds AdamW's constants; weightDecay is 0 if the block is left out."""

    @property
    def answers_per_iteration(self) -> int:
        """Answers that are drawn before the model changes."""
        return self.prompts_per_iteration * self.group_size

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps on an iteration's answers."""
        return self.epochs_per_iteration * self.answers_per_iteration // self.global_batch_size

    @property
    def estimator(self) -> Estimator:
        """How the divergence is estimated."""
        return self.kl.estimator or (Estimator.K3 if self.algorithm is Algorithm.GRPO else Estimator.K1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.answers_per_iteration % self.global_batch_size:
            remedy = f"{_WHOLE_BATCHES}, {self.answers_per_iteration}"
            raise FieldError("globalBatchSize", self.global_batch_size, remedy)
        if self.group_size < 2 and self.algorithm is not Algorithm.PPO:
            raise FieldError("groupSize", self.group_size, _OTHERS)
        if self.max_new_tokens >= self.sequence_length:
            raise FieldError("maxNewTokens", self.max_new_tokens, _ROOM)
        judge = self.from_.reward if self.from_ is not None else None
        if (judge is not None) != any(reward.model is not None for reward in self.rewards):
            raise FieldError("rewards", judge or "no from.reward", _REWARD_MODEL)
        if self.loss is not GrpoLoss.GRPO and self.algorithm is not Algorithm.GRPO:
            raise FieldError("loss", self.loss.value, _LOSS)
        return self
