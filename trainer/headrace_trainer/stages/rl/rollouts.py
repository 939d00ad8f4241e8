"""Answers drawn from the model that trains, rewarded, and made into what it learns from.

In: prompts, judges, the model as it is at the beginning of an iteration. Out: the loop's ``Samples``. Each answer's draws
are a function of the seed, its iteration and its place in it, so the weights that an iteration began with bring back its
answers; a checkpoint from the middle of an iteration has them with it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from headrace_api.stages import Rl
from headrace_api.stages.rl import Algorithm
from headrace_trainer import board
from headrace_trainer.engine.advantages import Judged, Worth, adapted, credit, neutral_for_failed
from headrace_trainer.engine.generation import Prompt, generate
from headrace_trainer.engine.hooks import Alarm, Hooks
from headrace_trainer.engine.losses import KlEstimator, kl_estimates
from headrace_trainer.engine.parallel import Gang
from headrace_trainer.engine.policy import Experience
from headrace_trainer.engine.sampling import Sampling
from headrace_trainer.engine.step import Stepper
from headrace_trainer.errors import UserError
from headrace_trainer.formats.packs import PackOrder, permutation
from headrace_trainer.formats.units import Units
from headrace_trainer.stages.rl import rails
from headrace_trainer.stages.rl.answers import Answer, dumps, loads, with_arrays
from headrace_trainer.stages.rl.judges import Judge
from headrace_trainer.stages.rl.passes import over_answers, token_log_probs, token_log_probs_and_values

_STATE, _ANSWERS = "rl.json", "answers.txt"
"""What a checkpoint keeps."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What answers are made with."""

    prompts: Units
    order: PackOrder
    judges: tuple[Judge, ...]
    """In the order of the stage's rewards."""
    reference: torch.nn.Module | None
    """The model that the policy is held to."""
    worth: Worth
    stop_tokens: frozenset[int]
    seed: int


class Rollouts(Hooks):
    """The answers of all iterations, as the loop's ``Samples``; only those of the present iteration are there.

    Args:
        config: the stage's.
        gang: this rank's place.
        parts: what answers are made with.
    """

    def __init__(self, config: Rl, gang: Gang, parts: Parts) -> None:
        self._config, self._gang, self._parts = config, gang, parts
        self.num_samples = parts.order.packs_per_epoch * config.group_size * config.epochs_per_iteration
        self._per_iteration = config.epochs_per_iteration * config.answers_per_iteration
        self._coefficient = self._next_coefficient = config.kl.coefficient
        self._iteration: int | None = None
        self.answers: list[Answer] = []
        self._experience: list[Experience] = []
        self._figures: dict[str, float] = {}

    # Samples -----------------------------------------------------------------------------------------------------

    def sample(self, index: int) -> Experience:
        """Answer ``index`` of the run, which is one of the present iteration's."""
        iteration, place = divmod(index, self._per_iteration)
        assert iteration == self._iteration
        count = self._config.answers_per_iteration
        epoch, place = divmod(place, count)
        if self._config.steps_per_iteration == 1:
            return self._experience[place]
        return self._experience[self._shuffled(epoch)[place]]

    def _shuffled(self, epoch: int) -> np.ndarray:
        return permutation(len(self._experience), key=f"{self._parts.seed}:{self._iteration}:{epoch}:answers")

    # Hooks -------------------------------------------------------------------------------------------------------

    def before_step(self, first: int, stepper: Stepper) -> None:
        """Draw the answers of the iteration that begins here, if it begins here.

        Raises:
            UserError: too many rewards could not be had.
        """
        iteration = first // self._per_iteration
        if iteration == self._iteration:
            return
        stepper.gather_weights()
        self._coefficient = self._next_coefficient
        self._take(iteration, self._all(self._draw(iteration, stepper.model)))
        self._check_rewards()
        if self._config.kl.target is not None:
            self._next_coefficient = adapted(
                self._coefficient,
                kl=self._figures["objective/kl"],
                target=self._config.kl.target,
                answers=len(self.answers),
                horizon=self._config.kl.horizon,
            )

    def figures(self) -> Mapping[str, float]:
        """Of the present iteration, by TRL's names."""
        return self._figures

    def alarm(self, records: Sequence[Mapping[str, Any]]) -> Alarm | None:
        """The rails of the stage."""
        return rails.alarm(records, self._config.rails)

    def weights_went_back(self) -> None:
        """Answers of weights that were taken back are drawn again, from those that are there now."""
        self._iteration = None

    def dumps(self, first: int) -> dict[str, str]:
        """The coefficients, and the answers that are not yet trained on."""
        within = first // self._per_iteration == self._iteration
        state = {
            "coefficient": self._coefficient,
            "next": self._next_coefficient,
            "iteration": self._iteration if within else None,
        }
        return {_STATE: json.dumps(state)} | ({_ANSWERS: dumps(self.answers)} if within else {})

    def loads(self, extras: Mapping[str, str]) -> None:
        """Go on with the answers of a checkpoint, if it has some."""
        state = json.loads(extras[_STATE])
        self._coefficient, self._next_coefficient = state["coefficient"], state["next"]
        if state["iteration"] is not None:
            self._take(state["iteration"], loads(extras[_ANSWERS]))

    # An iteration ------------------------------------------------------------------------------------------------

    def _draw(self, iteration: int, model: torch.nn.Module) -> list[Answer]:
        """This replica's answers, with all that the models and the judges say of them."""
        numbers = range(self._gang.data_rank, self._config.answers_per_iteration, self._gang.layout.data)
        units = [self._unit(iteration, number) for number in numbers]
        answers = self._generated(iteration, numbers, units, model)
        answers = self._scored(answers, [self._parts.prompts.note(unit) for unit in units])
        return self._recomputed(answers, model)

    def _unit(self, iteration: int, number: int) -> int:
        """The prompt of an answer of an iteration."""
        place = iteration * self._config.prompts_per_iteration + number // self._config.group_size
        return int(self._parts.order.units(place)[0])

    def _generated(
        self, iteration: int, numbers: Sequence[int], units: Sequence[int], model: torch.nn.Module
    ) -> list[Answer]:
        sampling = Sampling(
            max_new_tokens=self._config.max_new_tokens,
            temperature=self._config.temperature,
            stop_tokens=self._parts.stop_tokens,
            seed=self._parts.seed,
        )
        prompts = [
            Prompt(id=f"{iteration}:{number}", tokens=self._parts.prompts[unit][0].tokens.tolist())
            for number, unit in zip(numbers, units, strict=True)
        ]
        made: list[Answer] = []
        for first in range(0, len(prompts), self._config.answers_at_once):
            some = prompts[first : first + self._config.answers_at_once]
            for prompt, completion in zip(some, generate(model, some, sampling, gang=self._gang), strict=True):
                sampled = np.array(completion.log_probs, dtype=np.float32)
                made.append(
                    Answer(
                        prompt=np.array(prompt.tokens, dtype=np.int64),
                        tokens=np.array(completion.tokens, dtype=np.int64),
                        stopped=completion.stopped,
                        sampled=sampled,
                        log_probs=sampled,
                    )
                )
            board.beat()
        return made

    def _scored(self, answers: Sequence[Answer], notes: Sequence[bytes]) -> list[Answer]:
        by_judge = [judge.verdicts(answers, notes) for judge in self._parts.judges]
        return [
            replace(answer, scores=tuple(v.score for v in said), timed_out=sum(v.timed_out for v in said))
            for answer, said in zip(answers, zip(*by_judge, strict=True), strict=True)
        ]

    def _recomputed(self, answers: list[Answer], model: torch.nn.Module) -> list[Answer]:
        """With log-probabilities as training computes them: by a whole pass, and not token by token."""
        temperature, length = self._config.temperature, self._config.sequence_length
        critic = self._config.algorithm is Algorithm.PPO
        forward = token_log_probs_and_values(temperature) if critic else token_log_probs(temperature)
        device = self._gang.device
        found = over_answers(model, answers, forward, width=1 + critic, length=length, device=device)
        answers = with_arrays(answers, "log_probs", [values[0] for values in found])
        if critic:
            answers = with_arrays(answers, "values", [values[1] for values in found])
        if self._parts.reference is not None:
            forward = token_log_probs(temperature)
            found = over_answers(self._parts.reference, answers, forward, width=1, length=length, device=device)
            answers = with_arrays(answers, "reference", [values[0] for values in found])
        return answers

    def _all(self, mine: list[Answer]) -> list[Answer]:
        """The answers of all replicas, in order, on every rank."""
        speaks = self._gang.tensor_rank == 0 and self._gang.is_first_stage
        parts = [part for part in self._gang.gather((self._gang.data_rank, mine) if speaks else None) if part]
        found: list[Answer | None] = [None] * self._config.answers_per_iteration
        for replica, answers in parts:
            found[replica :: self._gang.layout.data] = answers
        return [answer for answer in found if answer is not None]

    def _take(self, iteration: int, answers: list[Answer]) -> None:
        """Make these the present iteration's."""
        self._iteration, self.answers = iteration, answers
        scores_NK = self._scores()
        rewards_N = scores_NK @ np.array([reward.weight for reward in self._config.rewards])
        judged = [
            Judged(
                reward=float(reward),
                stopped=a.stopped,
                log_probs=a.log_probs,
                reference=a.reference,
                values=a.values,
            )
            for a, reward in zip(answers, rewards_N, strict=True)
        ]
        credited = credit(judged, self._parts.worth, kl_coefficient=self._coefficient)
        in_loss = self._coefficient if self._config.algorithm is Algorithm.GRPO else 0.0
        self._experience = [
            Experience(
                document=a.document,
                log_probs=a.log_probs,
                advantages=c.advantages,
                reference=a.reference,
                values=a.values,
                returns=c.returns,
                kl_weight=in_loss,
            )
            for a, c in zip(answers, credited, strict=True)
        ]
        self._figures = self._measured(scores_NK, rewards_N)

    def _scores(self) -> np.ndarray:
        """Of each answer by each judge, float64 [N, K]; those that could not be had teach nothing."""
        columns = np.array([a.scores for a in self.answers], dtype=np.float64).T
        group = self._config.group_size
        return np.stack([neutral_for_failed(column, group_size=group) for column in columns], axis=1)

    def _check_rewards(self) -> None:
        scores_NK = np.array([a.scores for a in self.answers])
        failed_K = (~np.isfinite(scores_NK)).mean(0)
        worst = int(failed_K.argmax())
        if failed_K[worst] > self._config.max_failed_share:
            n = int(np.flatnonzero(~np.isfinite(scores_NK[:, worst]))[0])
            raise UserError(
                f"rl.rewards[{worst}]: {self._config.rewards[worst].name}: {failed_K[worst]:.1%} of iteration "
                f"{self._iteration}'s scores are not numbers (answer {n}: {scores_NK[n, worst]}), and maxFailedShare "
                f"allows {self._config.max_failed_share:.1%}: see to the reward, or raise maxFailedShare"
            )

    def _measured(self, scores_NK: np.ndarray, rewards_N: np.ndarray) -> dict[str, float]:
        answers, rewards_PG = self.answers, rewards_N.reshape(-1, self._config.group_size)
        lengths = [len(a.tokens) for a in answers]
        spread_P = rewards_PG.std(1, ddof=1) if self._config.group_size > 1 else np.zeros(len(rewards_PG))
        differences = np.concatenate([np.abs(a.sampled - a.log_probs) for a in answers])
        figures = {
            "reward": rewards_N.mean(),
            "reward_std": spread_P.mean(),
            "frac_reward_zero_std": (spread_P < 1e-8).mean(),
            "rewards/failed": (~np.isfinite([a.scores for a in answers])).sum(),
            "rewards/timed_out": sum(a.timed_out for a in answers),
            "completions/mean_length": np.mean(lengths),
            "completions/min_length": min(lengths),
            "completions/max_length": max(lengths),
            "completions/clipped_ratio": 1 - np.mean([a.stopped for a in answers]),
            "train_rollout_logprob_abs_diff": differences.mean(),
            "objective/entropy": np.mean([-a.log_probs.sum() for a in answers]),
            "objective/scores": rewards_N.mean(),
        }
        for i, reward in enumerate(self._config.rewards):
            figures[f"rewards/{reward.name}/mean"] = scores_NK[:, i].mean()
        if answers[0].reference is not None:
            kl = np.mean([_divergence(a, KlEstimator.K1) for a in answers])
            figures |= {
                "objective/kl": kl,
                "objective/kl_coef": self._coefficient,
                "objective/rlhf_reward": rewards_N.mean() - self._coefficient * kl,
            }
        return {name: float(value) for name, value in figures.items()}


def _divergence(answer: Answer, kind: KlEstimator) -> float:
    assert answer.reference is not None
    one, other = torch.from_numpy(answer.log_probs).double(), torch.from_numpy(answer.reference).double()
    return float(kl_estimates(one, other, kind=kind).sum())
