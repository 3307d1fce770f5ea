"""Show what happens when things break: `python -m tests.reliability [name ...]`; without names, all of it.

Each scenario prints its figures. The exit code is 1 if a promise was broken, 2 for a name that there is not.
"""

import argparse
import asyncio
import importlib
import logging
import pathlib
import platform
import signal
import sys
import traceback

from tests.reliability.report import Report


def names() -> list[str]:
    """Return the names of all scenarios."""
    modules = pathlib.Path(__file__).parent.glob("scenario_*.py")
    return sorted(path.stem.removeprefix("scenario_").replace("_", "-") for path in modules)


def play(name: str, *, quick: bool) -> Report:
    """Run one scenario; return what it has shown. One that does not come to its end has broken a promise."""
    module = importlib.import_module(f"tests.reliability.scenario_{name.replace('-', '_')}")
    report = Report(quick=quick)

    async def scenario() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # so that it ends its processes
        await module.scenario(report)

    try:
        asyncio.run(scenario())
    except Exception as error:  # noqa: BLE001 - it is told
        traceback.print_exc()
        report.promise(f"it comes to its end: {type(error).__name__}", False)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    which = f"{', '.join(names())} (default: all)"
    parser.add_argument("names", nargs="*", choices=[[], *names()], metavar="name", help=which)
    parser.add_argument("--quick", action="store_true", help="a small version, as the tests run it; no time is judged")
    given = parser.parse_args()
    logging.getLogger("meshkit").setLevel(logging.CRITICAL)  # who is met and lost is not of interest here
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}", flush=True)
    broken = 0
    for name in given.names or names():
        print(f"\n{name}", flush=True)
        broken += len(play(name, quick=given.quick).broken)
    print(f"\n{broken} promises broken" if broken else "\nevery promise was kept")
    return 1 if broken else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
