"""The quantile of recent durations against a naive model: the whole history, sorted each time."""

import math
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from meshkit._recent_durations import RecentDurations


class Few(RecentDurations):
    WINDOW = 8
    LEAST = 3


# Few values, so that equal ones enter and leave; some quantiles fall on an observation, some between two.
@given(
    durations=st.lists(st.integers(0, 9).map(float) | st.floats(0, 1e9), max_size=40),
    share=st.sampled_from([0.25, 0.5, 0.75, 1.0]) | st.floats(0.001, 1.0),
)
@settings(max_examples=200)
def test_the_quantile_agrees_with_that_of_the_last_ones_sorted(durations: list[float], share: float) -> None:
    recent = Few(share)
    assert recent.quantile() is None
    for number, duration in enumerate(durations, 1):
        recent.add(duration)
        last = sorted(durations[max(0, number - Few.WINDOW) : number])
        expected = next(d for d in last if sum(other <= d for other in last) >= share * len(last))
        assert recent.quantile() == (None if number < Few.LEAST else expected)


def test_the_95th_percentile_of_a_hundred_is_what_ninety_five_took_at_most() -> None:
    recent = RecentDurations(0.95)
    for number in range(100, 0, -1):
        assert recent.quantile() is None
        recent.add(float(number))
    assert recent.quantile() == 95.0


def test_no_more_is_kept_than_the_window() -> None:
    recent = RecentDurations(0.95)
    for number in range(5 * recent.WINDOW):
        recent.add(math.sin(number))
    sizes = {len(kept) for kept in vars(recent).values() if not isinstance(kept, float)}
    assert sizes == {recent.WINDOW}


@pytest.mark.parametrize(
    ("quantile", "kind"), [(0, ValueError), (1.5, ValueError), (math.nan, ValueError), ("p95", TypeError)]
)
def test_a_quantile_is_a_share(quantile: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="quantile must be"):
        RecentDurations(quantile)
