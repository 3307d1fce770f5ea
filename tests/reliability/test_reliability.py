"""The scenarios in a small version, so that they do not rot; no time is judged. And that they can fail."""

import logging
import math
import sys
from collections.abc import Iterator

import pytest

from tests.reliability import scenario_kill
from tests.reliability.__main__ import main, names, play
from tests.reliability.report import Report

pytestmark = pytest.mark.real_time


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("meshkit")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@pytest.mark.parametrize("name", names())
def test_every_promise_is_kept(name: str) -> None:
    assert play(name, quick=True).broken == []


def test_a_broken_promise_is_told_and_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(report: Report) -> None:
        report.promise("the sun rises in the west", False)
        report.within("it took", [0.5, 2.0, 0.001], 1.0)
        report.within("and then", [0.5], 1.0)

    monkeypatch.setattr(scenario_kill, "scenario", scenario)
    monkeypatch.setattr(sys, "argv", ["reliability", "kill"])
    assert main() == 1
    out = capsys.readouterr().out
    assert "BROKEN the sun rises in the west" in out
    assert "BROKEN it took: median 500 ms, at most 2 s (limit 1 s)" in out
    assert "ok    and then: median 500 ms" in out
    assert out.endswith("2 promises broken\n")


def test_what_never_ends_is_a_broken_promise_even_where_no_time_is_judged() -> None:
    report = Report(quick=True)
    report.within("it took", [2.0], 1.0)
    assert report.broken == []
    report.within("it took", [2.0, math.inf], 1.0)
    assert len(report.broken) == 1


def test_a_scenario_that_gives_up_has_broken_a_promise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(report: Report) -> None:
        raise TimeoutError("they never met")

    monkeypatch.setattr(scenario_kill, "scenario", scenario)
    assert play("kill", quick=True).broken == ["it comes to its end: TimeoutError"]
    assert "they never met" in capsys.readouterr().err


def test_calls_that_fail_in_another_way_than_promised_are_a_broken_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenario_kill, "PeerLost", TimeoutError)
    [broken] = play("kill", quick=True).broken
    assert "failed with PeerLost, and none with anything else" in broken
