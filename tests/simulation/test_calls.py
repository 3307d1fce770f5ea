import sys

import pytest

from meshkit.testing import simulated
from tests.simulation.__main__ import main
from tests.simulation.calls import many_calls


def test_many_calls_over_a_bad_network_each_take_effect_once_and_the_trace_is_the_same() -> None:
    traces = [simulated(seed, lambda sim: many_calls(sim, 500)).trace for seed in (1, 1, 2)]
    assert traces[0] == traces[1] != traces[2]


def test_an_hour_of_heartbeats_breakers_and_batches_is_soon_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulation", "hour"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("an hour in ")
