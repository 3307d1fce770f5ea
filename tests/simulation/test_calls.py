import subprocess
import sys

from meshkit.testing import simulated
from tests.simulation.calls import many_calls
from tests.simulation.hour import an_hour


def test_many_calls_over_a_bad_network_each_take_effect_once_and_the_trace_is_the_same() -> None:
    traces = [simulated(seed, lambda sim: many_calls(sim, 1000)) for seed in (1, 1, 2)]
    assert traces[0] == traces[1] != traces[2]


def test_an_hour_of_heartbeats_breakers_and_batches() -> None:
    happened = simulated(1, an_hour)
    assert happened == simulated(1, an_hour)
    assert 12 < happened["refused"] / 12 < 60  # of 60 calls in each bad five minutes


def test_the_command_says_what_it_has_done() -> None:
    command = [sys.executable, "-m", "tests.simulation", "cluster", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 seeds of five nodes in a storm: 0 failed")
    assert not done.stderr
