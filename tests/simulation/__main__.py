"""Simulate meshkit: `cluster` in a storm (seeds), `mutants` of it (seeds), very many `calls` (calls), or an `hour`.

It shows what it does, and what has happened. The exit code is 0 if all held, 1 if something did not.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import pytest

from meshkit.testing import simulated
from tests.simulation.calls import timed_calls
from tests.simulation.cluster import EXPECTED, scenario
from tests.simulation.hour import an_hour
from tests.simulation.mutants import MUTANTS

T = TypeVar("T")
R = TypeVar("R")

ENOUGH = 100
"""Seeds in which everything happens that can."""


def play(seed: int) -> tuple[int, str, Counter[str]]:
    """Play the scenario of the cluster once; return what was wrong, and what has happened."""
    try:
        return seed, "", simulated(seed, scenario, buggify=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is shown
        return seed, said(error), Counter()


def hunt(given: tuple[int, int]) -> tuple[str, int, str]:
    """Return which of so many seeds finds a mutant first (-1: none), and what it says."""
    mutant, seeds = MUTANTS[given[0]], given[1]
    with pytest.MonkeyPatch.context() as patch:
        mutant.patch(patch)
        for seed in range(seeds):
            _, wrong, _ = play(seed)
            if mutant.says in wrong:
                return mutant.name, seed, wrong.partition("\n")[0][:150]
    return mutant.name, -1, ""


def said(error: Exception) -> str:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def on_all_processors(work: Callable[[T], R], inputs: Sequence[T]) -> Iterator[R]:
    """Do it for each input; show how far it is, on a terminal. Ctrl-C ends it at once."""
    begun, terminal = time.monotonic(), sys.stderr.isatty()
    pool = ProcessPoolExecutor()
    try:
        futures = [pool.submit(work, each) for each in inputs]
        for done, future in enumerate(as_completed(futures), 1):
            if terminal:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
            yield future.result()
            if terminal and done < len(inputs):
                filled = 40 * done // len(inputs)
                left = (time.monotonic() - begun) / done * (len(inputs) - done)
                bar = "#" * filled + "." * (40 - filled)
                print(f"[{bar}] {done} of {len(inputs)}, {left:.0f} s left", end="", file=sys.stderr, flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def cluster(seeds: int) -> bool:
    """Play the scenario with so many seeds."""
    begun, failed, happened = time.monotonic(), 0, Counter[str]()
    for seed, wrong, what in on_all_processors(play, range(seeds)):
        happened.update(what)
        if wrong:
            failed += 1
            print(f"MESHKIT_SEED={seed} pytest tests/simulation/test_cluster.py -k storm\n  {wrong[:2000]}", flush=True)
    for each, count in sorted(happened.items()):
        print(f"{count:9,} {each}")
    missed = [each for each in EXPECTED if not happened[each]] if seeds >= ENOUGH else []
    if missed:
        print("this never happened, so it was not tested:", ", ".join(missed))
    print(f"{seeds} seeds of five nodes in a storm: {failed} failed ({time.monotonic() - begun:.0f} s)")
    return not failed and not missed


def mutants(seeds: int) -> bool:
    """See which of so many seeds finds each fault that is put into meshkit."""
    found = 0
    for mutant, seed, says in on_all_processors(hunt, [(number, seeds) for number in range(len(MUTANTS))]):
        print(f"{mutant}: " + (f"seed {seed} says: {says}" if seed >= 0 else "NOT FOUND"), flush=True)
        found += seed >= 0
    print(f"{found} of {len(MUTANTS)} faults are found within {seeds} seeds")
    return found == len(MUTANTS)


def calls(count: int) -> bool:
    """Make so many calls over a bad network, in each of two processes, whose hashes and memory are different."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        runs = [future.result() for future in [pool.submit(timed_calls, count) for _ in range(2)]]
    for tally, rate in runs:
        frames = f"{tally.lost} frames lost, {tally.doubled} doubled, {tally.late} out of order"
        print(f"{tally.replies} calls, {tally.effects} effects; {frames}; trace {tally.trace} ({rate:,.0f} calls/s)")
    return runs[0][0] == runs[1][0]


def hour() -> bool:
    """Let an hour pass."""
    begun = time.perf_counter()
    happened = simulated(1, an_hour)
    seconds = time.perf_counter() - begun
    print(f"an hour in {seconds:.2f} s:", ", ".join(f"{number} {what}" for what, number in happened.items()))
    return True


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    seeds = os.environ.get("MESHKIT_SEEDS") or "1000"
    for run, default, what in ((cluster, seeds, "seeds"), (mutants, "200", "seeds"), (calls, "100000", "calls")):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.add_argument("count", nargs="?", type=positive, default=default, help=f"how many {what} ({default})")
        command.set_defaults(run=lambda given, run=run: run(given.count))
    commands.add_parser("hour", help=hour.__doc__).set_defaults(run=lambda _: hour())
    given = parser.parse_args()
    try:
        return 0 if given.run(given) else 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
