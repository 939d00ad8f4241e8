"""The agent reads from the board exactly what ranks wrote, from any process, and never half of it."""

import multiprocessing
import os
import time

import pytest

from headrace_trainer import board
from headrace_trainer.board import BOARD_VARIABLE, Board


def test_a_slot_is_empty_at_first():
    slot = Board.create(2).slots[1]
    assert (slot.counts, slot.progress, slot.words) == ((0, 0), None, None)


def test_a_beat_is_counted_but_says_nothing_new():
    slot = Board.create(1).slots[0]
    slot.report("one")
    slot.beat()
    slot.beat()
    assert (slot.counts, slot.progress) == ((3, 1), "one")
    slot.report("two")
    assert (slot.counts, slot.progress) == ((4, 2), "two")


def test_slots_do_not_touch():
    first, second = Board.create(2).slots
    first.say("é" * 16_000)
    second.report("x" * 32_000)
    second.say("")
    assert (first.progress, first.words) == (None, "é" * 16_000)
    assert (second.progress, second.words) == ("x" * 32_000, None)


def test_a_shorter_report_leaves_nothing_of_a_longer_one():
    slot = Board.create(1).slots[0]
    slot.report("a long report")
    slot.report("short")
    assert slot.progress == "short"


def test_what_does_not_fit_is_refused():
    slot = Board.create(1).slots[0]
    slot.report("before")
    with pytest.raises(ValueError, match="exceed the slot's"):
        slot.report("x" * 40_000)
    assert (slot.counts, slot.progress) == ((1, 1), "before")


def _report_until(stop, path):
    os.environ[BOARD_VARIABLE] = path
    slot = board.take_slot(1)
    n = 0
    while not stop.is_set():
        n += 1
        slot.report(f"{n % 10}" * (1 + n % 3000))
        board.beat()


def test_another_process_is_read_while_it_writes():
    shared = Board.create(2)
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    writer = context.Process(target=_report_until, args=(stop, f"/proc/{os.getpid()}/fd/{shared.fd}"), daemon=True)
    writer.start()
    seen, deadline = set(), time.monotonic() + 120
    while len(seen) < 10:
        assert time.monotonic() < deadline
        text = shared.slots[1].progress
        if text is not None:
            assert text == text[0] * len(text)
            seen.add(len(text))
    stop.set()
    writer.join()
    beats, reports = shared.slots[1].counts
    assert beats == 2 * reports > 0
    assert shared.slots[0].counts == (0, 0)


def test_without_an_agent_nothing_is_said(monkeypatch):
    monkeypatch.delenv(BOARD_VARIABLE, raising=False)
    assert board.take_slot(0) is None
    board.beat()
