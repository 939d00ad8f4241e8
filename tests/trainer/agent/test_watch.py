"""Tables: which rank is late, which does not answer, and which one the others wait for."""

import pytest

from headrace_trainer.agent.watch import Beat, Look, Watch, percentile_99, suspect


def ticking(watch, seconds):
    """Let time pass in steps of a fifth of a second, as the agent's loop does."""
    clock = getattr(watch, "test_clock", 0.0)
    for _ in range(round(seconds * 5)):
        clock += 0.2
        watch.tick(clock)
    watch.test_clock = clock


def stepping(watch, *, seconds, steps, phase="Running", rank=0, beats=0):
    """A rank that has taken steps of one length, and is in the next one; how often it has beaten."""
    for n in range(1, steps + 2):
        watch.see(rank, Beat(beats=beats + n, reports=beats + n, phase=phase, done=n))
        if n <= steps:
            ticking(watch, seconds)
    return beats + steps + 1


@pytest.mark.parametrize(
    ("phase", "steps", "seconds", "on_stall", "bound"),
    [
        ("Running", 100, 0.2, None, 60.0),
        ("Running", 100, 20.0, None, 100.0),
        ("Running", 2, 0.2, None, 600.0),
        ("Running", 100, 20.0, 30.0, 30.0),
        ("Running", 2, 0.2, 30.0, 150.0),
        ("Saving", 10, 20.0, None, 100.0),
        ("Saving", 10, 20.0, 30.0, 100.0),
        ("Saving", 10, 2.0, 30.0, 30.0),
        ("Saving", 1, 20.0, None, 600.0),
        ("Saving", 1, 20.0, 30.0, 150.0),
    ],
    ids=[
        *("short steps: a minute", "long steps: five times as long", "unknown steps: ten minutes"),
        *("as onStall says", "unknown steps: five times onStall"),
        *("long saves", "long saves are longer than onStall", "short saves: onStall"),
        *("unknown saves", "unknown saves: five times onStall"),
    ],
)
def test_how_long_a_rank_may_be_silent(phase, steps, seconds, on_stall, bound):
    watch = Watch(on_stall=on_stall)
    stepping(watch, seconds=seconds, steps=steps, phase=phase)
    assert watch.bound(0) == pytest.approx(bound)
    ticking(watch, bound - 1)
    assert watch.late() == []
    ticking(watch, 2)
    (late,) = watch.late()
    assert (late.rank, late.phase, late.done) == (0, phase, steps + 1)
    assert late.seconds == pytest.approx(bound + 1, abs=0.3)


def test_the_first_step_does_not_count_nor_does_one_in_a_hundred():
    watch = Watch()
    watch.see(0, Beat(beats=1, reports=1, phase="Running"))
    ticking(watch, 200)  # compiles
    beats = stepping(watch, seconds=0.2, steps=100, beats=1)
    assert watch.bound(0) == 60.0
    ticking(watch, 50)
    stepping(watch, seconds=0.2, steps=50, beats=beats)
    assert watch.bound(0) == 60.0


def test_steps_that_are_shorter_than_a_look_are_known_too():
    watch = Watch()
    for n in range(3):
        watch.see(0, Beat(beats=100 * n + 1, reports=100 * n + 1, phase="Running"))
        ticking(watch, 0.2)
    assert watch.bound(0) == 60.0


def test_a_beat_between_reports_is_a_sign_of_life_but_no_record():
    watch = Watch()
    stepping(watch, seconds=100.0, steps=10, phase="Saving")
    for n in range(100):
        watch.see(0, Beat(beats=1000 + n, reports=11, phase="Saving"))
        ticking(watch, 10)
    assert watch.late() == []
    assert watch.bound(0) == pytest.approx(500.0)


def test_the_time_in_which_the_agent_was_paused_does_not_count():
    watch = Watch()
    stepping(watch, seconds=0.2, steps=100)
    watch.tick(watch.test_clock + 10_000)
    assert watch.late() == []


def test_a_rank_that_has_ended_is_not_late():
    watch = Watch()
    for rank in (0, 1):
        stepping(watch, seconds=0.2, steps=10, rank=rank)
    ticking(watch, 100)
    assert {late.rank for late in watch.late()} == {0, 1}
    watch.forget(0)
    assert {late.rank for late in watch.late()} == {1}


@pytest.mark.parametrize(
    ("phase", "steps", "seconds", "waited", "answers"),
    [
        ("Running", 10, 0.2, 9, True),
        ("Running", 10, 0.2, 11, False),
        ("Running", 10, 30.0, 59, True),
        ("Running", 10, 30.0, 61, False),
        ("Running", 1, 0.2, 11, False),
        ("Evaluating", 10, 0.2, 11, False),
        ("Evaluating", 1, 0.2, 1000, True),
        ("Saving", 10, 0.2, 1000, True),
        ("Stopping", 1, 0.2, 1000, True),
        ("Loading", 1, 0.2, 11, False),
    ],
)
def test_who_answers_a_request_to_stop(phase, steps, seconds, waited, answers):
    watch = Watch()
    stepping(watch, seconds=seconds, steps=steps, phase=phase)
    ticking(watch, waited)
    assert watch.unanswered(seconds_since_stop=waited) == ([] if answers else [0])


def test_silence_before_the_request_is_no_refusal():
    watch = Watch()
    stepping(watch, seconds=0.2, steps=10)
    ticking(watch, 30)
    assert watch.unanswered(seconds_since_stop=1.0) == []


def look(rank, *, phase="Running", done=7, seconds=60.0, stopped=False, in_collective=True):
    return Look(rank=rank, phase=phase, done=done, seconds=seconds, stopped=stopped, in_collective=in_collective)


@pytest.mark.parametrize(
    ("looks", "rank"),
    [
        ([look(0), look(1, stopped=True)], 1),
        ([look(0, done=6), look(1, stopped=True)], 1),
        ([look(0), look(1, done=6)], 1),
        ([look(0, phase="Saving", seconds=50), look(1, seconds=60)], 1),
        ([look(0), look(1, in_collective=False)], 1),
        ([look(0), look(1)], None),
        ([look(0, in_collective=False), look(1, in_collective=False)], None),
        ([look(0, in_collective=None), look(1, in_collective=False)], None),
        ([look(0, in_collective=False)], 0),
        ([look(0)], None),
        ([], None),
    ],
    ids=[
        *("held", "held before behind", "a step behind", "a phase behind", "not waiting"),
        *("all wait", "none waits", "not all are known", "alone", "alone, and waits for another pod", "nobody"),
    ],
)
def test_which_rank_the_others_wait_for(looks, rank):
    found = suspect(looks)
    assert (None if found is None else found.rank) == rank


@pytest.mark.parametrize(("times", "expected"), [([3.0], 3.0), ([1.0, 2.0, 3.0], 3.0), ([*range(1, 101)], 99)])
def test_the_99th_percentile(times, expected):
    assert percentile_99(times) == expected
