import asyncio
import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import pytest

from meshkit.events import Event, notify, report
from meshkit.testing import Leak, run


@dataclasses.dataclass(frozen=True, slots=True)
class Landed(Event):
    planet: str


class Stop(BaseException):
    pass


def broken(event: Event) -> None:
    raise ValueError(f"cannot bear {event}")


def test_an_observer_is_given_each_event_in_order() -> None:
    seen: list[Event] = []
    for planet in ("Mars", "Venus"):
        notify(seen.append, Landed(planet))
    assert seen == [Landed("Mars"), Landed("Venus")]


def test_nobody_listens_and_nothing_happens() -> None:
    notify(None, Landed("Mars"))


def test_an_event_is_plain_frozen_data() -> None:
    event = Landed("Mars")
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.planet = "Venus"  # type: ignore[misc]
    assert not hasattr(event, "__dict__")
    assert event == Landed("Mars")
    assert hash(event) == hash(Landed("Mars"))
    assert pickle.loads(pickle.dumps(event)) == event


async def test_what_an_observer_raises_goes_to_the_exception_handler_of_the_loop_and_no_further() -> None:
    contexts: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: contexts.append(context))
    notify(broken, Landed("Mars"))
    assert [context["message"] for context in contexts] == ["meshkit: observer failed on Landed"]
    assert str(contexts[0]["exception"]) == "cannot bear Landed(planet='Mars')"


def test_run_fails_a_test_whose_observer_failed() -> None:
    async def main() -> None:
        notify(broken, Landed("Mars"))

    with pytest.raises(Leak, match="observer failed on Landed") as caught:
        run(main)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    "error", [asyncio.CancelledError(), KeyboardInterrupt(), SystemExit(), GeneratorExit(), Stop()], ids=repr
)
def test_what_is_no_exception_passes_through(error: BaseException) -> None:
    def stop(_: Event) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        notify(stop, Landed("Mars"))
    assert caught.value is error


def test_groups_pass_through_if_one_member_is_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)

    def fail(group: BaseExceptionGroup[Any]) -> None:
        def observer(_: Event) -> None:
            raise group

        notify(observer, Landed("Mars"))

    fail(ExceptionGroup("only errors", [ValueError()]))
    assert len(seen) == 1
    with pytest.raises(BaseExceptionGroup):
        fail(BaseExceptionGroup("one is not", [ValueError(), asyncio.CancelledError()]))


def test_outside_of_a_loop_it_goes_to_the_hook_for_what_cannot_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    error = ValueError("boom")
    try:
        raise error
    except ValueError as caught:
        report(caught, "the formatter failed", print)
    notify(broken, Landed("Mars"))
    notify(seen.append, Landed("Venus"))
    first, second, last = seen
    assert first.exc_value is error
    assert first.exc_type is ValueError
    assert first.exc_value.__context__ is None
    assert repr(first.object) == "meshkit: the formatter failed: <built-in function print>"
    assert repr(second.object).startswith("meshkit: observer failed on Landed: <function broken")
    assert last == Landed("Venus")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_hook_that_python_has_by_itself_prints_it_and_the_work_goes_on() -> None:
    ended = python(
        "from meshkit.events import Event, notify\n"
        "def broken(event):\n"
        "    raise ValueError('boom')\n"
        "notify(broken, Event())\n"
        "print('went on')\n"
    )
    assert (ended.returncode, ended.stdout) == (0, "went on\n")
    assert ended.stderr.startswith("Exception ignored in: meshkit: observer failed on Event: <function broken")
    assert ended.stderr.endswith("ValueError: boom\n")


def test_a_hook_that_fails_itself_stops_nothing_either() -> None:
    ended = python(
        "import sys\n"
        "from meshkit.events import report\n"
        "sys.unraisablehook = None\n"
        "report(ValueError('boom'), 'failed', None)\n"
        "print('went on')\n"
    )
    assert (ended.returncode, ended.stdout) == (0, "went on\n")


async def test_an_exception_handler_that_fails_itself_stops_nothing_either(caplog: pytest.LogCaptureFixture) -> None:
    def handler(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        raise RuntimeError("and again")

    asyncio.get_running_loop().set_exception_handler(handler)
    notify(broken, Landed("Mars"))
    assert "meshkit: observer failed on Landed" in caplog.text
