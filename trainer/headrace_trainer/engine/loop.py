"""The training loop, as a list of what happens at a step.

In: the parts, built by ``pretrain``. Out: a trained model in place, a history, committed checkpoints; or ``Stopped``
once a checkpoint is safe. Every rank runs the same loop; what only one rank can know (it was told to stop, it is time
to save) is added up with the loss, so that all ranks do the same thing after the same step.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from headrace_api.run import SavedCheckpoint
from headrace_api.stages.finetune import EarlyStop
from headrace_api.stages.training import Training
from headrace_trainer.engine.batches import Batches
from headrace_trainer.engine.checkpoint.checkpointer import Checkpointer
from headrace_trainer.engine.checkpoint.state import TrainState
from headrace_trainer.engine.device import send
from headrace_trainer.engine.garbage import collect_after, collected_between_steps
from headrace_trainer.engine.history import History
from headrace_trainer.engine.hooks import Hooks
from headrace_trainer.engine.pace import Pace
from headrace_trainer.engine.parallel import Gang, Sum
from headrace_trainer.engine.schedule import is_due, learning_rate
from headrace_trainer.engine.skips import Verdict, judge, last_update
from headrace_trainer.engine.step import Stepper
from headrace_trainer.engine.stopping import reason_to_stop
from headrace_trainer.errors import Stopped, StorageError, UserError
from headrace_trainer.formats.model_card import HISTORY_FILE

log = logging.getLogger("headrace")

SAVES_THAT_MAY_FAIL = 2
"""In a row, while training goes on: ending it would lose all that was done since the newest checkpoint."""


class Host(Protocol):
    """What the loop needs of a ``StageContext``."""

    def report(self, **fields: Any) -> None:
        """Say how far this rank is."""

    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop."""


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What all ranks know after a step's one exchange."""

    loss: float
    """Mean loss over what counts in the global batch, in nats."""
    metrics: dict[str, float]
    """Means of the objective's other figures."""
    must_stop: bool
    must_save: bool
    may_advance: bool
    """Whether every rank has done its part of the checkpoint that is on its way."""


@dataclass(kw_only=True)
class Loop:
    """Steps from where the state is to the end."""

    config: Training
    steps: int
    """Optimizer steps in the whole stage."""
    gang: Gang
    host: Host
    stepper: Stepper
    training: Batches
    validation: Batches | None
    """Samples that are measured and not trained on, if there are any."""
    checkpointer: Checkpointer
    state: TrainState
    start: Callable[[], None]
    """Sets the start weights; called only where no checkpoint is loaded over them."""
    hooks: Hooks = field(default_factory=Hooks)
    """What the stage does around steps."""
    early_stop: EarlyStop | None = None
    """When training ends before its last step."""
    keeps_best: bool = False
    """Whether training ends with the weights whose held-out loss is the lowest, and not with the last."""
    history: History = field(default_factory=History)
    step: int = 0
    saved: SavedCheckpoint | None = None
    message: str = ""
    _saved_step: int = field(default=-1, init=False)
    """The step of the newest checkpoint, which may be on its way."""
    _saved_at: float = field(default_factory=time.monotonic, init=False)
    _failed_saves: int = field(default=0, init=False)
    """Since the newest commit."""
    pace: Pace = field(init=False)

    def __post_init__(self) -> None:
        self.pace = Pace(self.config.tokens_per_step)

    def resume(self) -> None:
        """Continue from the newest committed checkpoint; start from the seed's weights where there is none."""
        self._report("Starting")
        found = self.checkpointer.resume()
        self.message = found.message
        if found.saved is None:
            self.start()
            return
        self.step, self.saved = found.saved.step, found.saved
        self._saved_step = self.step
        assert found.consumed_samples == self.consumed_samples
        self.history = History.loads(found.extras[HISTORY_FILE])
        self.hooks.loads(found.extras)

    def run(self) -> None:
        """Train to the last step, or until the held-out loss no longer falls.

        Raises:
            Stopped: some rank was asked to stop; a checkpoint of this step is committed.
            StorageError: checkpoints cannot be saved, or the best one cannot be loaded.
            UserError: too many losses or gradients were not finite numbers, or a figure went too far.
        """
        self.pace.restart()
        with collected_between_steps():
            while not self.is_over:
                self.advance()
        self.stepper.gather_weights()
        self._commit()  # should the model not reach storage, the next attempt has only that left to do
        self._take_best()

    def advance(self) -> None:
        """One step, and what is due after it.

        Raises:
            Stopped: as ``run``.
            StorageError: as ``run``.
            UserError: as ``run``.
        """
        agreed = self._train_step()
        if agreed.may_advance:
            self._take_further(self.checkpointer.advance)
        skipped = "skipped" in self.history.records[-1]
        went_back = self._answer_skip() if skipped else self._answer_alarm()
        is_best = self._validation_due() and self._validate()
        must_stop = agreed.must_stop and not self.is_over
        # A skipped step has nothing new, and its checkpoint would push out one whose weights are older.
        if must_stop or went_back or is_best or (agreed.must_save and not skipped):
            self._save()
        self._report("Running")
        if must_stop:
            self._commit()
            raise Stopped(f"stopped after step {self.step}; its checkpoint is committed", step=self.step)
        collect_after(self.step)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to train."""
        return self.step >= self.steps or reason_to_stop(self.history.records, self.early_stop) is not None

    @property
    def consumed_samples(self) -> int:
        """Number of the next sample."""
        return self.step * self.config.global_batch_size

    def _train_step(self) -> Agreed:
        self.hooks.before_step(self.consumed_samples, self.stepper)
        batch = self.training.read(self.consumed_samples, self.config.global_batch_size)
        exchange = self._exchange(self.stepper.gradients(batch))
        # The ranks meet for the norm; the exchange, begun before it, has then arrived as well.
        grad_norm = self.stepper.gradient_norm()
        agreed = self._agreed(exchange)
        self.step += 1
        rate = learning_rate(self.config.schedule, step=self.step, steps=self.steps)
        tokens = self.step * self.config.tokens_per_step
        if math.isfinite(agreed.loss) and math.isfinite(grad_norm):
            self.stepper.update(learning_rate=rate, gradient_norm=grad_norm)
            self.history.add(
                step=self.step,
                loss=agreed.loss,
                metrics={**agreed.metrics, **self.hooks.figures()},
                grad_norm=grad_norm,
                learning_rate=rate,
                tokens=tokens,
            )
        else:
            what = f"the loss is {agreed.loss}" if math.isfinite(grad_norm) else f"the gradient norm is {grad_norm}"
            self.history.add_skipped(step=self.step, reason=what, learning_rate=rate, tokens=tokens)
        self.pace.step()
        return agreed

    def _exchange(self, sums: torch.Tensor) -> Sum:
        """Begin the one exchange of a step: the loss, and what any rank asks for."""
        elapsed = time.monotonic() - self._saved_at
        every = self.config.checkpoint.every
        # Clocks differ between ranks: only the first rank's says that it is time to save. Time does not pile up saves.
        waits = isinstance(every, str) and self.checkpointer.is_saving
        save = self.gang.is_first and not waits and is_due(every, step=self.step + 1, seconds=elapsed)
        asked = [self.host.stop_requested(), save, self.checkpointer.ready]
        said = send(torch.tensor(asked, dtype=torch.float64), self.gang.device)
        return self.gang.start_sum(torch.cat((sums, said)))

    def _agreed(self, exchange: Sum) -> Agreed:
        *sums, stops, saves, ready = exchange.result()
        loss, metrics = self.stepper.means(sums)
        return Agreed(
            loss=loss,
            metrics=metrics,
            must_stop=stops > 0,
            must_save=saves > 0,
            may_advance=ready == self.gang.layout.world,
        )

    def _answer_skip(self) -> bool:
        """Go on, go back, or give up, after a step that was skipped; whether it went back."""
        newest, left_out = self.history.records[-1], self.history.num_left_out
        self.message = f"skipped step {self.step}: {newest['skipped']}; {left_out} steps left out so far"
        if self.gang.is_first:
            log.warning(self.message)
        verdict = judge(self.history.records, self.config.non_finite)
        if verdict is Verdict.ROLL_BACK and self._roll_back():
            return True
        if verdict is not Verdict.GO_ON:
            raise UserError(
                f"step {self.step}: {newest['skipped']}, once more than nonFinite allows, and an older checkpoint "
                f"{'did not help' if verdict is Verdict.GIVE_UP else 'is not there'}: lower schedule.learningRate "
                f"({self.config.schedule.learning_rate}), lengthen schedule.warmup ({self.config.schedule.warmup}), "
                "or look for bad documents in the corpus"
            )
        return False

    def _answer_alarm(self) -> bool:
        """Go on, go back, or wait for people, by what the stage says of the newest step; whether it went back."""
        alarm = self.hooks.alarm(self.history.records)
        if alarm is None:
            return False
        if alarm.roll_back and self._roll_back():
            self.message = f"{alarm.reason}: {self.message}"
            return True
        self._commit()
        raise UserError(f"paused after step {self.step}, whose checkpoint is committed: {alarm.reason}")

    def _roll_back(self) -> bool:
        """Take the weights of the newest checkpoint that has others, and leave out the data that was read since."""
        self._finish_saving()
        self._report("Loading")
        self.stepper.gather_weights()
        found = self.checkpointer.restore(before=last_update(self.history.records))
        if found is None:
            return False
        self.history.roll_back(found.step)
        self.hooks.weights_went_back()
        self.message = f"took back the updates of steps {found.step + 1} to {self.step}, and left their data out"
        if self.gang.is_first:
            log.warning(self.message)
        return True

    def _validation_due(self) -> bool:
        every = self.config.validation.every
        return self.validation is not None and (self.step % every == 0 or self.step == self.steps)

    def _validate(self) -> bool:
        """Measure the held-out loss; whether these weights are to be kept as the best so far."""
        assert self.validation is not None, "see _validation_due"
        self._report("Evaluating")
        size = min(self.config.validation.samples, self.validation.samples.num_samples)
        self.hooks.before_validation(size, self.stepper)
        sums = self.gang.start_sum(self.stepper.losses(self.validation.read(0, size))).result()
        self.history.add_validation(*self.stepper.means(sums))
        self.pace.restart()
        reason = reason_to_stop(self.history.records, self.early_stop)
        if reason is not None:
            self.history.records[-1]["stopped_early"] = self.message = reason
        return self.keeps_best and self.history.note_best()

    def _take_best(self) -> None:
        """Put the best weights in the place of the last, where they are not the same.

        Raises:
            StorageError: they cannot be loaded.
        """
        best = self.history.kept_step
        if best is None or best == self.step:
            return
        self._report("Loading")
        found = self.checkpointer.restore_at(best)
        if found is None:
            raise StorageError(
                f"the checkpoint of step {best}, whose held-out loss is the lowest, cannot be loaded: "
                "restore it from a backup, or set keep to last"
            )
        said = f"the weights are those of step {best}, whose held-out loss is the lowest"
        self.message = f"{self.message}; {said}" if self.message else said

    def _save(self) -> None:
        """Begin a checkpoint of this step, unless there is one, after the one before it."""
        if self._saved_step == self.step:
            return
        self._finish_saving()
        self._report("Saving")
        self._saved_step, self._saved_at = self.step, time.monotonic()
        self.stepper.gather_weights()
        first = self.consumed_samples
        self._take_further(
            lambda: self.checkpointer.save(
                step=self.step,
                steps=self.step if self.is_over else self.steps,
                consumed_samples=first,
                protect=self.history.kept_step,
                extras=lambda: {HISTORY_FILE: self.history.dumps(), **self.hooks.dumps(first)},
            )
        )
        self.pace.restart()

    def _commit(self) -> None:
        """Save this step, and wait until it is committed; what fails is tried again."""
        while self.saved is None or self.saved.step != self.step:
            self._save()
            self._finish_saving()

    def _finish_saving(self) -> None:
        """Wait until the checkpoint on its way is committed, or has failed."""
        if self.checkpointer.is_saving:
            self._report("Saving")
            self._take_further(self.checkpointer.finish)
            self._report("Saving")
            self.pace.restart()

    def _take_further(self, act: Callable[[], SavedCheckpoint | None]) -> None:
        """Take the newest checkpoint further; if it fails, go on to the next one, unless too many have failed in a row."""
        try:
            saved = act()
        except StorageError as error:
            self._failed_saves += 1
            if self._failed_saves > SAVES_THAT_MAY_FAIL:
                raise
            self.message = f"the checkpoint of step {self._saved_step} was not saved: {error}"
            self.history.note_lost(self._saved_step)
            self._saved_step = -1 if self.saved is None else self.saved.step
            if self.gang.is_first:
                log.warning(self.message)
            return
        if saved is not None:
            self.saved = saved
            if self._failed_saves:
                self._failed_saves, self.message = 0, ""

    def _report(self, phase: str) -> None:
        """Said by every rank after every step: the agent takes a rank that says nothing for one that hangs."""
        self.host.report(
            phase=phase,
            done=self.step,
            total=self.steps,
            unit="steps",
            loss=self.history.loss,
            tokens_per_second=self.pace.tokens_per_second,
            eta_seconds=self.pace.seconds_for(self.steps - self.step),
            checkpoint=self.saved,
            message=self.message[:1024],
        )
