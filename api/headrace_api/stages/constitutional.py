"""The constitutional stage: a model, prompts and principles -> records that later stages train on (arXiv 2212.08073)."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from headrace_api.base import Duration, FieldError, Line, Matches, Name, Part, Spec, StoredUri, api_rules, rule
from headrace_api.stages.base import ArtifactKind, StageName
from headrace_api.stages.finetune import ORIGIN_RULE, ModelInputs, StartsFromModel
from headrace_api.stages.rules import RuleReward

MOST_PRINCIPLES = 32

_ONE_SIDE = "set either forbids or requires"


class PrincipleRule(Spec):
    """What can be checked of a principle without a model."""

    model_config = api_rules(rule("has(self.forbids) != has(self.requires)", _ONE_SIDE))

    forbids: RuleReward | None = None
    """forbids is a rule that an answer violates by being as it says."""
    requires: RuleReward | None = None
    """requires is a rule that an answer violates by not being as it says."""

    @property
    def rule(self) -> RuleReward:
        """The rule that is set."""
        found = self.forbids or self.requires
        assert found is not None
        return found

    @model_validator(mode="after")
    def _one_side(self) -> Self:
        if (self.forbids is None) == (self.requires is None):
            raise FieldError("", "none" if self.forbids is None else "both", _ONE_SIDE)
        return self


class Principle(Spec):
    """One principle of a constitution, and how a model is asked about it."""

    name: Name
    """name is unique in the constitution; figures are given by it."""
    critique_request: str = Field(min_length=1, max_length=4096)
    """critiqueRequest asks for a critique of the last answer."""
    revision_request: str = Field(min_length=1, max_length=4096)
    """revisionRequest asks for a better answer, after the critique."""
    comparison_question: str = Field(min_length=1, max_length=4096)
    """comparisonQuestion asks which of two answers is better."""
    rule: PrincipleRule | None = None
    """rule says without a model whether an answer violates the principle; where it is unset, the critic is asked."""


def check_names(principles: Sequence[Principle]) -> None:
    """Refuse two principles of one name.

    Raises:
        FieldError: relative to the block that holds them.
    """
    names = [principle.name for principle in principles]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise FieldError("principles", twice, "is used twice; names must be unique in a constitution")


class ConstitutionFile(Spec):
    """What a constitution's file holds, as YAML or JSON."""

    version: Line = Field(max_length=64)
    """version is changed whenever a principle is."""
    principles: list[Principle] = Field(min_length=1, max_length=256)
    """principles are drawn from, one for each pass over a prompt."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        check_names(self.principles)
        return self


_ONE_PLACE = "set either uri, to read the principles from a file, or principles; not both"
_VERSIONED = "is needed beside principles; write one, as 1, and change it whenever a principle is changed"


class Constitution(Spec):
    """The principles that answers are held to."""

    model_config = api_rules(
        rule("has(self.uri) != (has(self.principles) && size(self.principles) > 0)", _ONE_PLACE),
        rule("has(self.uri) || has(self.version)", f"version {_VERSIONED}"),
    )

    uri: StoredUri | None = None
    """uri is a YAML or JSON file with version and principles. A relative path is relative to the manifest."""
    version: Line | None = Field(None, max_length=64)
    """version is that of the principles; beside uri, the file must have this one, and any if unset."""
    principles: list[Principle] = Field(default_factory=list, max_length=MOST_PRINCIPLES)
    """principles are drawn from, one for each pass over a prompt, by the seed."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.uri is not None) == bool(self.principles):
            raise FieldError("uri", self.uri, _ONE_PLACE)
        if self.uri is None and self.version is None:
            raise FieldError("version", None, _VERSIONED)
        check_names(self.principles)
        return self


class Endpoint(Spec):
    """A server that speaks OpenAI's protocol."""

    url: Annotated[
        str,
        Field(max_length=1024),
        Matches(
            r"^https?://[A-Za-z0-9._-]+(:[0-9]{1,5})?(/[A-Za-z0-9._~%/+-]*)?$",
            "write the address below which /chat/completions is, as https://host/v1, without a user, a password or a query",
        ),
    ]
    """url is the address below which /chat/completions is, as https://host/v1."""
    model: Line = Field(max_length=256)
    """model is what the server calls the model."""
    token_variable: Annotated[
        Annotated[
            str,
            Field(max_length=256),
            Matches(r"^[A-Z_][A-Z0-9_]*$", "write the name of an environment variable, as CRITIC_TOKEN, not the token"),
        ]
        | None,
        Part.EXECUTION,
    ] = None
    """tokenVariable names the environment variable of the pods that holds the token, as the TrainingRuntime's podTemplate sets it from a Secret; no token is sent if unset."""
    timeout: Annotated[Duration, Part.EXECUTION] = "60s"
    """timeout is how long one request may take."""
    retries: Annotated[int, Part.EXECUTION] = Field(4, ge=0, le=20)
    """retries is how often a request is repeated after a time-out, a lost connection, 429 or an error of the server, with growing pauses."""
    at_once: Annotated[int, Part.EXECUTION] = Field(8, ge=1, le=256)
    """atOnce is the number of requests that one replica has under way."""


class Reviser(StrEnum):
    """Who writes revisions."""

    MODEL = "model"
    CRITIC = "critic"


class Critic(Spec):
    """Who criticizes answers and compares them: the model itself, unless from.critic or endpoint names another."""

    endpoint: Endpoint | None = None
    """endpoint is a server that criticizes."""
    temperature: float = Field(1.0, ge=0, le=100)
    """temperature divides the logits of critiques and of chains of thought; 0 takes the likeliest token."""
    max_new_tokens: int = Field(256, ge=1, le=2**20)
    """maxNewTokens is the longest critique or chain of thought; a longer one is cut."""
    revisions: Reviser = Reviser.MODEL
    """revisions is who writes revisions: the model, so that it learns what it could have said, or the critic."""


class Writes(StrEnum):
    """Which records the stage leaves."""

    REVISIONS = "revisions"
    """prompt, completion: the last revision, for sft."""
    PREFERENCES = "preferences"
    """prompt, chosen, rejected, for dpo and reward."""


class Judgement(StrEnum):
    """How the critic compares two answers."""

    CHAIN_OF_THOUGHT = "chainOfThought"
    """It thinks first; then the probabilities of the two letters, which are close to 0 and 1, are clamped."""
    DIRECT = "direct"
    """The probabilities of the two letters as they are."""


class Orders(StrEnum):
    """In which order the critic sees two answers. It may like the first one better for being the first."""

    BOTH = "both"
    """In both; the label is the mean."""
    DRAWN = "drawn"
    """In one, drawn by the seed."""


class Labels(StrEnum):
    """What becomes of a probability."""

    LIKELIER = "likelier"
    """The likelier answer is the chosen one."""
    DRAWN = "drawn"
    """The chosen one is drawn with its probability: over many pairs, that is training on the probabilities themselves."""


class Preferences(Spec):
    """How pairs are labelled."""

    judgement: Judgement = Judgement.CHAIN_OF_THOUGHT
    """judgement is how the critic compares: chainOfThought or direct."""
    clamp: float = Field(0.6, ge=0.5, le=1)
    """clamp is the highest probability after a chain of thought, and 1 - clamp the lowest; 0.6 keeps them in 40 to 60%."""
    orders: Orders = Orders.BOTH
    """orders is how the two answers are shown: both, or drawn."""
    labels: Labels = Labels.LIKELIER
    """labels is what becomes of a probability: likelier or drawn."""


class ConstitutionalInputs(ModelInputs):
    """What answers, and what criticizes."""

    ACCEPTS: ClassVar[dict[str, ArtifactKind]] = ModelInputs.ACCEPTS | {"critic": ArtifactKind.CHECKPOINT}

    critic: StageName | None = None
    """critic names the stage whose model criticizes, if it is neither the model itself nor an endpoint."""


_ROOM = "must be below sequenceLength: prompts need room"
_ONE_CRITIC = "set either from.critic or critic.endpoint, not both"


class Constitutional(StartsFromModel):
    """Constitutional AI: let a model answer, criticize and revise, or choose between its answers, by written principles."""

    model_config = api_rules(
        ORIGIN_RULE,
        rule("self.maxNewTokens < self.sequenceLength", f"maxNewTokens {_ROOM}"),
        rule("self.critic.maxNewTokens < self.sequenceLength", f"critic.maxNewTokens {_ROOM}"),
        rule(
            "!has(self.critic.endpoint) || !has(self.from) || !has(self.from.critic)", f"critic.endpoint: {_ONE_CRITIC}"
        ),
    )

    KIND = "constitutional"
    GIVES = ArtifactKind.RECORDS

    from_: ConstitutionalInputs | None = Field(None, alias="from")
    """from names the model that answers, and the one that criticizes if that is another."""
    constitution: Constitution
    """constitution is the principles."""
    write: Writes = Writes.REVISIONS
    """write is which records are left: revisions, for sft, or preferences, for dpo and reward."""
    passes: int = Field(1, ge=1, le=64)
    """passes is how often an answer is criticized and revised, each time by another draw of a principle."""
    max_new_tokens: int = Field(256, ge=1, le=2**20)
    """maxNewTokens is the longest answer or revision; prompts that leave no room for it in sequenceLength are left out, and counted."""
    temperature: float = Field(1.0, ge=0, le=100)
    """temperature divides the logits of answers and revisions; 0 takes the likeliest token."""
    critic: Critic = Field(default_factory=Critic)
    """critic is who criticizes and compares."""
    preferences: Preferences = Field(default_factory=Preferences)
    """preferences is how pairs are labelled."""
    prompts_at_once: Annotated[int, Part.EXECUTION] = Field(64, ge=1, le=2**20)
    """promptsAtOnce is the number of prompts that the replicas go through together. What is finished is kept, so a restart repeats at most so many; each replica's share of their cache must fit into memory."""
    max_failed_share: Annotated[float, Part.EXECUTION] = Field(0.1, ge=0, le=1)
    """maxFailedShare bounds the share of the prompts that give no record because an answer does not end or a critic does not answer usably; below it they are left out and counted."""

    @property
    def critic_stage(self) -> str | None:
        """The stage whose model criticizes; None for the model itself and for an endpoint."""
        return self.from_.critic if self.from_ is not None else None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_new_tokens >= self.sequence_length:
            raise FieldError("maxNewTokens", self.max_new_tokens, _ROOM)
        if self.critic.max_new_tokens >= self.sequence_length:
            raise FieldError("critic.maxNewTokens", self.critic.max_new_tokens, _ROOM)
        if self.critic.endpoint is not None and self.critic_stage is not None:
            raise FieldError("critic.endpoint", self.critic_stage, _ONE_CRITIC)
        return self
