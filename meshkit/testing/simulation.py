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
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
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
    chosen = tuple(range(_check.count("seeds", seeds))) if isinstance(seeds, int) else tuple(seeds)
    if not chosen:
        raise ValueError("seeds must name at least one, or the test would test nothing")

    def decorate(test: _Test) -> Callable[..., None]:
        signature = inspect.signature(test)
        if not inspect.iscoroutinefunction(test) or "sim" not in signature.parameters:
            raise TypeError(f"simulate is for `async def test(sim)`, not {test!r}")

        @functools.wraps(test)
        def run_each_seed(*args: Any, **kwargs: Any) -> None:
            for seed in _seeds(chosen):
                try:
                    simulated(seed, lambda sim: test(*args, sim=sim, **kwargs), buggify=buggify)
                except BaseException as error:
                    error.add_note(f"MESHKIT_SEED={seed} {_command(test)}")
                    raise

        rest = [parameter for name, parameter in signature.parameters.items() if name != "sim"]
        run_each_seed.__signature__ = signature.replace(parameters=rest)  # type: ignore[attr-defined]
        return run_each_seed

    return decorate


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
    if not os.path.exists(path):  # pytest names it as seen from its root directory
        path = os.path.relpath(inspect.getfile(test))
    return f"pytest {shlex.quote(f'{path}::{name}')}"
