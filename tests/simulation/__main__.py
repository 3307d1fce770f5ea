"""Simulate meshkit: `python -m tests.simulation cluster 1000`, `calls 1000000` or `hour`; each says what it has done.

The exit code is 1 if something did not hold.
"""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

from meshkit.testing import simulated
from tests.simulation.calls import timed_calls
from tests.simulation.cluster import scenario
from tests.simulation.hour import an_hour


def play(seed: int) -> tuple[int, str]:
    """Play the scenario of the cluster once; return what was wrong."""
    try:
        simulated(seed, scenario, buggify=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is shown
        inner = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        return seed, f"{type(inner).__name__}: {inner}"
    return seed, ""


def show(done: int, count: int, begun: float) -> None:
    """Draw a progress bar, on a terminal."""
    if sys.stderr.isatty():
        filled = 40 * done // count
        left = (time.monotonic() - begun) / done * (count - done)
        bar = "#" * filled + "." * (40 - filled)
        print(f"\r[{bar}] {done} of {count} seeds, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
        if done == count:
            print(file=sys.stderr)


def cluster(count: int) -> bool:
    """Play the scenario with so many seeds, on all processors."""
    begun, failed = time.monotonic(), 0
    with ProcessPoolExecutor() as pool:
        for done, future in enumerate(as_completed([pool.submit(play, seed) for seed in range(count)]), 1):
            seed, wrong = future.result()
            if wrong:
                failed += 1
                print(f"\nMESHKIT_SEED={seed} pytest tests/simulation/test_cluster.py\n  {wrong[:2000]}", flush=True)
            show(done, count, begun)
    seconds = time.monotonic() - begun
    print(f"{count} seeds of five nodes in a storm: {failed} failed ({seconds:.0f} s, {os.cpu_count()} processors)")
    return not failed


def calls(count: int) -> bool:
    """Make so many calls over a bad network, in each of two processes, whose hashes and memory are different."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        runs = [future.result() for future in [pool.submit(timed_calls, count) for _ in range(2)]]
    for trace, rate in runs:
        print(f"{count} calls, {count} effects: trace {trace} ({rate:,.0f} calls/s)")
    return runs[0][0] == runs[1][0]


def hour() -> bool:
    """Let an hour pass."""
    begun = time.perf_counter()
    happened = simulated(1, an_hour)
    seconds = time.perf_counter() - begun
    print(f"an hour in {seconds:.2f} s:", ", ".join(f"{number} {what}" for what, number in happened.items()))
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("what", choices=["cluster", "calls", "hour"])
    parser.add_argument("count", nargs="?", type=int, help="how many seeds (1000), or calls (100000)")
    given = parser.parse_args()
    if given.what == "hour":
        kept = hour()
    elif given.what == "calls":
        kept = calls(given.count or 100_000)
    else:
        kept = cluster(given.count or int(os.environ.get("MESHKIT_SEEDS") or 1000))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
