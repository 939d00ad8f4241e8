"""How often pods report: as often as one operator can take from all of them."""

from headrace_operator.progress import REPORTS_PER_SECOND, Crowd


def round_of(crowd: Crowd, pods: int, *, now: float) -> float:
    """Every pod reports; what the last is told."""
    return max(crowd.seconds_to_next(f"pod-{i}", now=now) for i in range(pods))


def test_few_pods_report_as_often_as_they_like():
    assert round_of(Crowd(), 100, now=0.0) < 1


def test_many_pods_together_stay_below_the_operators_rate():
    crowd = Crowd()
    for now in (0.0, 20.0, 40.0):
        seconds = round_of(crowd, 5000, now=now)
        assert 5000 / seconds == REPORTS_PER_SECOND


def test_pods_that_have_ended_are_not_counted_for_long():
    crowd = Crowd()
    round_of(crowd, 5000, now=0.0)
    for now in range(10, 100, 10):
        seconds = round_of(crowd, 50, now=float(now))
    assert seconds == 50 / REPORTS_PER_SECOND
