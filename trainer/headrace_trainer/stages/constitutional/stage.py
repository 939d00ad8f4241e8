"""The parts of a constitutional stage, and its way through the units.

In: a ``StageContext`` with a model, and perhaps a critic. Out: in ``ctx.output``, records, transcripts, the constitution,
samples and a report; the final figures as metrics. Nothing is trained.
"""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import orjson

from headrace_api.artifact import canonical_digest, resume_identity
from headrace_api.parallelism import layout
from headrace_api.stages import Constitutional
from headrace_api.stages.constitutional import ConstitutionFile, Writes
from headrace_trainer.engine.finetune import DATA_REPORT, Start, prepare
from headrace_trainer.engine.model.build import check_precision
from headrace_trainer.engine.model.loading import load_model
from headrace_trainer.engine.origin import check_fit
from headrace_trainer.engine.parallel import Gang, join_gang
from headrace_trainer.errors import Stopped, UserError
from headrace_trainer.formats.dataset import RECORDS_FILE
from headrace_trainer.formats.model_card import TOKENIZER_FOLDER, read_card
from headrace_trainer.formats.packs import Packing, PackOrder
from headrace_trainer.formats.records import PROMPT_SHAPES, PromptRecord, Record
from headrace_trainer.rules import check_columns
from headrace_trainer.stage import StageContext
from headrace_trainer.stages.constitutional import report
from headrace_trainer.stages.constitutional.comparing import compared
from headrace_trainer.stages.constitutional.constitution import FIELD, digest_of, read_constitution
from headrace_trainer.stages.constitutional.endpoint import EndpointSpeaker, token_of
from headrace_trainer.stages.constitutional.revising import Parts, revised
from headrace_trainer.stages.constitutional.speakers import ModelSpeaker, Speaker
from headrace_trainer.stages.constitutional.totals import Totals
from headrace_trainer.stages.constitutional.transcripts import Asked, Row, as_line, record
from headrace_trainer.stages.constitutional.units import KeptUnits, Span, spans

TRANSCRIPTS_FILE = "transcripts.jsonl"
CONSTITUTION_FILE, REPORT_FILE = "constitution.json", "report.json"
SAMPLES_TEXT, SAMPLES_PAGE, PICTURE_FILE = "samples.md", "samples.html", "violations.png"
_LOGGED = 3
"""Samples in the log."""

log = logging.getLogger("headrace")


def run_constitutional(ctx: StageContext) -> dict[str, float]:
    """Write records. Every rank of the gang calls.

    Returns:
        How many prompts gave a record, and violations before and after, by principle.

    Raises:
        UserError: bad configuration or data, or too many prompts gave no record.
        StorageError: storage failed.
        Stopped: asked to stop; finished units are kept.
    """
    config = ctx.config
    assert isinstance(config, Constitutional)
    check_precision(config.precision)
    constitution = read_constitution(ctx, config.constitution)
    if config.critic.endpoint is not None:
        token_of(config.critic.endpoint)  # rather now than after the model was loaded
    # The last token of an answer is not read by the model, so it needs no position.
    start = prepare(ctx, config, allowed=PROMPT_SHAPES, room=config.max_new_tokens - 1, note=whole_prompt)
    prompts = Prompts(start, config, seed=ctx.resolved.seed)
    prompts.check(constitution)
    axes = layout(config.parallelism, num_ranks=ctx.world)
    local_world = ctx.resolved.stage.compute.ranks
    with join_gang(
        axes, rank=ctx.rank, local_rank=ctx.local_rank, local_world=local_world, seed=ctx.resolved.seed
    ) as gang:
        kept = KeptUnits(ctx.store, stage=ctx.resolved.stage.name, identity=_identity(ctx, start, constitution))
        units = spans(len(prompts), size=config.prompts_at_once)
        _Work(ctx, gang, start, prompts, constitution, kept).through(units)
        return _leave(ctx, gang, start, constitution, kept, units, total=len(prompts))


def whole_prompt(record: Record) -> bytes:
    """All that is known of a prompt, as JSON."""
    assert isinstance(record, PromptRecord)
    found = {"prompt": record.prompt, "tools": record.tools, "columns": record.others}
    return orjson.dumps(found, default=str)


class Prompts:
    """The prompts by number, in an order that is a function of the seed.

    Args:
        start: what the stage begins with.
        config: the stage's.
        seed: of the run.
    """

    def __init__(self, start: Start, config: Constitutional, *, seed: int) -> None:
        self._units = start.dataset.train
        self._order = PackOrder(
            self._units.lengths,
            capacity=config.sequence_length,
            seed=seed,
            packing=Packing.NONE,
            shares=start.dataset.shares,
        )

    def __len__(self) -> int:
        return self._order.packs_per_epoch

    def __getitem__(self, number: int) -> Asked:
        found = orjson.loads(self._units.note(int(self._order.units(number)[0])))
        return Asked(number=number, prompt=found["prompt"], tools=found["tools"], columns=found["columns"])

    def check(self, constitution: ConstitutionFile) -> None:
        """Refuse rules that cannot be used with these prompts.

        Raises:
            UserError: which, and why.
        """
        rules = {p.name: p.rule.rule for p in constitution.principles if p.rule is not None}
        for name, rule in rules.items():
            if getattr(rule.block, "column", None) is not None:
                for number in range(len(self)):
                    check_columns(rule, self[number].columns, place=f"prompt {number}", field=f"{FIELD}: {name}")


def _identity(ctx: StageContext, start: Start, constitution: ConstitutionFile) -> str:
    """Digest of all that a transcript depends on."""
    inputs = {slot: ref.digest for slot, ref in ctx.resolved.inputs.items()}
    inputs |= {"data": start.digest, "constitution": digest_of(constitution)}
    return canonical_digest(resume_identity(ctx.config, seed=ctx.resolved.seed, inputs=inputs))


@dataclass
class _Work:
    """From unit to unit."""

    ctx: StageContext
    gang: Gang
    start: Start
    prompts: Prompts
    constitution: ConstitutionFile
    kept: KeptUnits

    def through(self, units: list[Span]) -> None:
        """Make every unit that is not there yet. Every rank calls.

        Raises:
            UserError: more prompts have failed than maxFailedShare allows; what failed last is not kept.
            Stopped: asked to stop.
        """
        totals, there = self.gang.from_first(lambda: self._found(units))
        self._check(totals)
        missing = [unit for unit in units if unit not in there]
        if not missing:
            return
        parts = self._parts()
        self._tell(totals, per_prompt_seconds=None)
        for i, unit in enumerate(missing):
            began = time.monotonic()
            rows = self._made(parts, unit)
            for row in rows:
                totals.add(row)
            self._check(totals)
            self.gang.from_first(partial(self.kept.keep, unit, rows))
            if self.gang.is_first and i < _LOGGED:
                self._log(rows)
            self._tell(totals, per_prompt_seconds=(time.monotonic() - began) / len(unit))

    def _found(self, units: list[Span]) -> tuple[Totals, set[Span]]:
        """Which units earlier attempts have kept, and what they come to."""
        totals, there = Totals(), set()
        for unit, rows in self.kept.found(units):
            there.add(unit)
            for row in rows:
                totals.add(row)
        return totals, there

    @property
    def _config(self) -> Constitutional:
        config = self.ctx.config
        assert isinstance(config, Constitutional)
        return config

    def _parts(self) -> Parts:
        """Load who speaks."""
        config, seed = self._config, self.ctx.resolved.seed
        self.ctx.report(phase="Loading", message="reading the model")
        model = ModelSpeaker(
            self.start.build(self.gang, config, seed=seed).eval(),
            tokenizer=self.start.tokenizer,
            stop_tokens=frozenset(self.start.card.stop_ids),
            length=config.sequence_length,
            seed=seed,
            gang=self.gang,
        )
        return Parts(
            config=config,
            constitution=self.constitution,
            model=model,
            critic=self._critic() or model,
            seed=seed,
            pause=self._stop_together,
        )

    def _critic(self) -> Speaker | None:
        """Who criticizes, if it is not the model itself."""
        config, seed = self._config, self.ctx.resolved.seed
        if config.critic.endpoint is not None:
            return EndpointSpeaker(
                config.critic.endpoint, seed=seed, gang=self.gang, stop_requested=self.ctx.stop_requested
            )
        if config.critic_stage is None:
            return None
        folder = self.ctx.input("critic")
        card = read_card(folder)
        check_fit(config, card.architecture)
        return ModelSpeaker(
            load_model(card, folder, self.gang),
            tokenizer=folder / TOKENIZER_FOLDER,
            stop_tokens=frozenset(card.stop_ids or (card.eod_id,)),
            length=config.sequence_length,
            seed=seed,
            gang=self.gang,
        )

    def _made(self, parts: Parts, unit: Span) -> list[Row]:
        """The rows of a unit, on every rank; replicas share the work."""
        gang = self.gang
        mine = [self.prompts[n] for n in range(unit.first + gang.data_rank, unit.end, gang.layout.data)]
        transcripts = (revised if self._config.write is Writes.REVISIONS else compared)(parts, mine)
        speaks = gang.tensor_rank == 0 and gang.is_first_stage
        gathered = gang.gather([t.row() for t in transcripts] if speaks else [])
        return sorted((row for rows in gathered for row in rows), key=lambda row: row["number"])

    def _stop_together(self) -> None:
        """Stop if any pod was asked to: a rank that went on alone would wait for the others for ever."""
        if self.gang.sum([float(self.ctx.stop_requested())])[0]:
            raise Stopped("asked to stop; finished prompts are kept")

    def _check(self, totals: Totals) -> None:
        problem = totals.problem(self._config, total=len(self.prompts))
        if problem is not None:
            raise UserError(problem)

    def _tell(self, totals: Totals, *, per_prompt_seconds: float | None) -> None:
        left = len(self.prompts) - totals.prompts
        self.ctx.report(
            phase="Running",
            done=totals.prompts,
            total=len(self.prompts),
            unit="prompts",
            eta_seconds=None if per_prompt_seconds is None else left * per_prompt_seconds,
            message=f"{totals.records:,} records, {totals.failed:,} failed",
        )

    def _log(self, rows: list[Row]) -> None:
        for row in [row for row in rows if "left_out" not in row][:1]:
            for line in report.logged(row):
                log.info("%s", line)


def _leave(
    ctx: StageContext,
    gang: Gang,
    start: Start,
    constitution: ConstitutionFile,
    kept: KeptUnits,
    units: list[Span],
    *,
    total: int,
) -> dict[str, float]:
    """Write the stage's output from the units. Every rank calls."""
    ctx.report(phase="Saving", message="writing the records")
    totals = gang.from_first(lambda: _write(ctx.output, start, constitution, kept.rows(units), total=total))
    return totals.metrics()


def _write(output: Path, start: Start, constitution: ConstitutionFile, rows: Iterator[Row], *, total: int) -> Totals:
    totals, samples = Totals(), report.Samples(total)
    with (output / RECORDS_FILE).open("wb") as records, (output / TRANSCRIPTS_FILE).open("wb") as transcripts:
        for row in rows:
            totals.add(row)
            samples.look(row)
            transcripts.write(as_line(row))
            if (kept := record(row)) is not None:
                records.write(as_line(kept))
    said = constitution.dump() | {"digest": digest_of(constitution)}
    found = {"constitution": {"version": constitution.version, "digest": said["digest"]}} | totals.as_json()
    (output / CONSTITUTION_FILE).write_text(json.dumps(said, indent=1))
    (output / REPORT_FILE).write_text(json.dumps(found, indent=1))
    (output / DATA_REPORT).write_text(json.dumps(start.dataset.report, indent=1))
    (output / SAMPLES_TEXT).write_text(report.markdown(samples.rows, totals, constitution))
    (output / SAMPLES_PAGE).write_text(report.page(samples.rows, totals, constitution))
    report.draw(totals, output / PICTURE_FILE)
    for line in report.logged_totals(totals):
        log.info("%s", line)
    return totals
