"""Run the benchmarks: `python -m tests.bench [name ...] [--quick]`; without names, all of them."""

import argparse
import importlib
import logging
import pathlib
import platform

from tests.bench.harness import Row


def names() -> list[str]:
    """Return the names of all benchmark modules."""
    return sorted(path.stem.removeprefix("bench_") for path in pathlib.Path(__file__).parent.glob("bench_*.py"))


def rows(name: str, *, quick: bool) -> list[Row]:
    """Run the benchmarks of one module."""
    module = importlib.import_module(f"tests.bench.bench_{name}")
    return [measure.run(quick) for measure in module.measures()]


def show(row: Row) -> str:
    """Format one line of the table."""
    mark = {True: "met", False: "OVER", None: ""}[row.met]
    return f"{row.name:<52} {row.figure:<34} {row.goal:<14} {mark:<5} {row.detail}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmarks: ours beside the bare primitive, in one run.")
    parser.add_argument("names", nargs="*", choices=[[], *names()], help="which ones (default: all)")
    parser.add_argument("--quick", action="store_true", help="only check that they run; the figures mean nothing")
    arguments = parser.parse_args()
    logging.getLogger("meshkit").setLevel(logging.ERROR)  # who is met and lost is not of interest here
    print(f"Python {platform.python_version()}, {platform.machine()}; medians (min-max) of interleaved rounds")
    met = over = 0
    for name in arguments.names or names():
        print(f"\n{name}", flush=True)
        for row in rows(name, quick=arguments.quick):
            print(f"  {show(row)}", flush=True)
            met += row.met is True
            over += row.met is False
    print(f"\n{met} goals met, {over} over")


if __name__ == "__main__":
    main()
