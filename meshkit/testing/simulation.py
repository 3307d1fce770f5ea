"""Tests that run once for each seed: `@simulate(seeds=100)`, and the one line that repeats the run that failed.

>>> import asyncio
>>> @simulate(seeds=20)
... async def test_nothing_is_lost(sim):
...     queue = asyncio.Queue()
...     async with asyncio.TaskGroup() as group:
...         group.create_task(queue.put("item"))
...         assert await queue.get() == "item"
>>> test_nothing_is_lost()
"""

import functools
import inspect
import os
import shlex
import sys
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from meshkit import _check
from meshkit.testing.sim_loop import SimLoop
from meshkit.testing.virtual_time import run

__all__ = ["simulate", "simulated"]

_T = TypeVar("_T")
_Test: TypeAlias = Callable[..., Coroutine[Any, Any, None]]


def simulated(seed: int, main: Callable[[SimLoop], Coroutine[Any, Any, _T]], *, buggify: bool = False) -> _T:
    """Run `main(sim)` on a fresh `SimLoop` of that seed and return its result; fail if it leaves anything behind.

    With `buggify`, points of `meshkit.buggify` fire.

    Raises:
        Leak, Deadlock, Livelock: As `run` does.
    """
    sim = SimLoop(seed, buggify=buggify)
    return run(partial(main, sim), loop=sim)


def simulate(*, seeds: int | Iterable[int], buggify: bool = False) -> Callable[[_Test], Callable[..., None]]:
    """Make a test of `async def test(sim)`, which runs on a fresh `SimLoop` for each seed, until one fails.

    The failure says how to repeat just that run: with the environment variable MESHKIT_SEED, which stands for all
    seeds of all tests. MESHKIT_SEEDS=1000 adds the seeds 0 to 999 to those of each test. Other arguments of the test
    (fixtures and parameters of pytest) are the same in all runs.

    Args:
        seeds: How many, from 0 on; or which. So to pin one that has failed: `[*range(20), 4711]`.
        buggify: Whether points of `meshkit.buggify` fire.
    """
    chosen = _chosen(seeds)

    def decorate(test: _Test) -> Callable[..., None]:
        signature = inspect.signature(test)
        if not inspect.iscoroutinefunction(test) or "sim" not in signature.parameters:
            raise TypeError(
                f"simulate is for `async def test(sim)`, not {test!r}; put other decorators (hypothesis.given, "
                "staticmethod) above it"
            )

        visible = signature.replace(parameters=[each for name, each in signature.parameters.items() if name != "sim"])

        @functools.wraps(test)
        def run_each_seed(*args: Any, **kwargs: Any) -> None:
            given = visible.bind(*args, **kwargs).arguments

            def main(sim: SimLoop) -> Coroutine[Any, Any, None]:
                bound = inspect.BoundArguments(signature, OrderedDict(given, sim=sim))
                return test(*bound.args, **bound.kwargs)

            for seed in _seeds(chosen):
                try:
                    simulated(seed, main, buggify=buggify)
                except BaseException as error:
                    error.add_note(f"MESHKIT_SEED={seed} {_command(test)}")
                    raise

        run_each_seed.__signature__ = visible  # type: ignore[attr-defined]
        return run_each_seed

    return decorate


def _chosen(seeds: int | Iterable[int]) -> tuple[int, ...]:
    if isinstance(seeds, int):
        return tuple(range(_check.count("seeds", seeds)))
    which: Any = seeds if isinstance(seeds, Iterable) else [seeds]  # type: ignore[redundant-expr]  # it may be a float
    chosen: tuple[Any, ...] = tuple(which)
    if any(isinstance(seed, bool) or not isinstance(seed, int) for seed in chosen):
        raise TypeError(f"seeds must be how many, or an iterable of whole numbers, not {seeds!r}")
    if not chosen:
        raise ValueError("seeds must name at least one, or the test would test nothing")
    return chosen


def _seeds(chosen: tuple[int, ...]) -> Iterable[int]:
    """Return the seeds to run, as the environment has it."""
    if one := os.environ.get("MESHKIT_SEED"):
        return [_number("MESHKIT_SEED", one)]
    return dict.fromkeys([*chosen, *range(_number("MESHKIT_SEEDS", os.environ.get("MESHKIT_SEEDS") or "0"))])


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"the environment variable {name} must be a whole number, not {text!r}") from None


def _command(test: Callable[..., object]) -> str:
    """Return the command that runs `test` again: with pytest the test alone, else this whole program."""
    node, _, _ = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")  # "path::name (call)"
    if not node:
        return shlex.join(sys.orig_argv)
    path, _, name = node.partition("::")
    for root in (Path.cwd(), *Path(inspect.getfile(test)).parents):  # pytest names it as seen from its root directory
        if (root / path).exists():
            path = os.path.relpath(root / path)
            break
    return f"pytest {shlex.quote(f'{path}::{name}')}"
