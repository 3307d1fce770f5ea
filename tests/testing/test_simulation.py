import asyncio
import os
import pathlib
import random
import re
import sys
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from meshkit.testing import Deadlock, SimLoop, simulate, simulated

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def seeds_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests say themselves which seeds run."""
    monkeypatch.delenv("MESHKIT_SEED", raising=False)
    monkeypatch.delenv("MESHKIT_SEEDS", raising=False)


def seeds_of(seeds: Any) -> list[int]:
    seen: list[int] = []

    @simulate(seeds=seeds)
    async def test(sim: SimLoop) -> None:
        seen.append(sim.seed)

    test()
    return seen


@pytest.mark.parametrize(
    ("seeds", "run"),
    [(3, [0, 1, 2]), ([7, 5, 7], [7, 5]), (range(2, 4), [2, 3]), ([*range(2), 4711], [0, 1, 4711]), ([-1], [-1])],
)
def test_a_number_means_the_first_seeds_and_a_list_means_those(seeds: Any, run: list[int]) -> None:
    assert seeds_of(seeds) == run


def test_an_iterator_of_seeds_serves_every_run() -> None:
    seen: list[int] = []

    @simulate(seeds=iter([4, 5]))
    async def test(sim: SimLoop) -> None:
        seen.append(sim.seed)

    test()
    test()
    assert seen == [4, 5, 4, 5]


def test_the_environment_says_which_one_to_repeat_or_how_many_more_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHKIT_SEEDS", "3")
    assert seeds_of([4711, 1]) == [4711, 1, 0, 2]
    monkeypatch.setenv("MESHKIT_SEED", "99")
    assert seeds_of([4711, 1]) == [99]


@pytest.mark.parametrize("name", ["MESHKIT_SEED", "MESHKIT_SEEDS"])
def test_a_seed_of_the_environment_that_is_no_number_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "many")
    with pytest.raises(ValueError, match=f"the environment variable {name} must be a whole number, not 'many'"):
        seeds_of(1)


@pytest.mark.parametrize("seeds", [0, -1, [], ()])
def test_no_seeds_are_refused(seeds: Any) -> None:
    with pytest.raises(ValueError, match="seeds must"):
        simulate(seeds=seeds)


@pytest.mark.parametrize("seeds", ["12", 1.5, None, [1.0], [0, True], ["1"]])
def test_seeds_that_are_no_whole_numbers_are_refused_at_once(seeds: Any) -> None:
    with pytest.raises(
        TypeError, match=re.escape(f"seeds must be how many, or an iterable of whole numbers, not {seeds!r}")
    ):
        simulate(seeds=seeds)


def test_arguments_may_come_by_position_and_by_name_wherever_sim_is_among_them() -> None:
    seen: list[object] = []

    @simulate(seeds=1)
    async def first(sim: SimLoop, a: int, b: int = 2, *rest: int, c: int = 3, **more: int) -> None:
        seen.append((sim.seed, a, b, rest, c, more))

    @simulate(seeds=1)
    async def last(a: int, b: int = 2, *, sim: SimLoop) -> None:
        seen.append((a, b, sim.seed))

    first(1)
    first(1, 5, 6, c=7, d=8)
    last(1)
    last(b=1, a=3)
    assert seen == [(0, 1, 2, (), 3, {}), (0, 1, 5, (6,), 7, {"d": 8}), (1, 2, 0), (3, 1, 0)]
    with pytest.raises(TypeError, match="missing a required argument: 'a'"):
        first()


@settings(max_examples=20)
@given(words=st.lists(st.text()), delay=st.floats(0, 1e6))
@simulate(seeds=2)
async def test_hypothesis_gives_arguments_as_well(sim: SimLoop, words: list[str], delay: float) -> None:
    await asyncio.sleep(delay)
    assert sim.now == delay
    assert random.random() == sim.stream("random").random(), "the seed of the simulation, not that of hypothesis"
    assert isinstance(words, list)


def test_what_is_no_test_of_a_simulation_is_refused() -> None:
    async def without() -> None: ...

    def plain(sim: SimLoop) -> None: ...

    for test in (without, plain):
        with pytest.raises(TypeError, match="simulate is for `async def test"):
            simulate(seeds=1)(test)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [1, 3])
@simulate(seeds=2)
async def test_fixtures_and_parameters_come_as_to_any_other_test(
    sim: SimLoop, length: int, tmp_path: pathlib.Path
) -> None:
    assert sim is asyncio.get_running_loop()
    assert tmp_path.is_absolute()
    assert length in {1, 3}


class TestInAClass:
    @simulate(seeds=2)
    async def test_a_method_is_a_test_as_well(self, sim: SimLoop) -> None:
        assert isinstance(self, TestInAClass)
        await asyncio.sleep(sim.seed)


def test_a_failure_says_which_seed_and_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    @simulate(seeds=10)
    async def test(sim: SimLoop) -> None:
        seen.append(sim.seed)
        assert sim.seed < 3

    with pytest.raises(AssertionError) as caught:
        test()
    assert seen == [0, 1, 2, 3]
    here = os.path.relpath(__file__)
    assert caught.value.__notes__ == [
        f"MESHKIT_SEED=3 pytest {here}::test_a_failure_says_which_seed_and_how_to_repeat_it"
    ]
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    with pytest.raises(AssertionError) as caught:
        test()
    assert caught.value.__notes__[0].startswith("MESHKIT_SEED=3 ")
    assert sys.orig_argv[-1] in caught.value.__notes__[0]


def test_a_deadlock_says_how_to_repeat_it() -> None:
    @simulate(seeds=[5])
    async def test(sim: SimLoop) -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock) as caught:
        test()
    assert caught.value.__notes__[0].startswith("MESHKIT_SEED=5 pytest ")


async def test_inside_a_running_loop_it_says_what_to_do() -> None:
    async def main(sim: SimLoop) -> None: ...

    with pytest.raises(RuntimeError, match=r"run\(\) starts a loop of its own"):
        simulated(1, main)


def test_each_run_starts_with_a_fresh_loop_and_fresh_chance() -> None:
    drawn: list[float] = []

    @simulate(seeds=[1, 2])
    async def test(sim: SimLoop) -> None:
        assert sim.time() == 0.0
        drawn.append(random.random())
        await asyncio.sleep(5)

    test()
    test()
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]


BASE = """
from meshkit.testing import simulate

class Promises:
    @simulate(seeds=[5])
    async def test_one(self, sim):
        assert False
"""

FAILS = """
import pytest
from meshkit.testing import simulate

@pytest.mark.parametrize("word", ["a b"])
@simulate(seeds=[3, 17])
async def test_it(sim, word):
    assert sim.seed != 17

@simulate(seeds=1)
async def test_that_is_skipped(sim):
    pytest.skip("not here")
"""


def test_pytest_shows_the_line_that_repeats_the_failure_and_the_line_does(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeini("[pytest]\naddopts = -p no:asyncio")
    folder = pytester.mkdir("tests")
    (folder / "test_it.py").write_text(FAILS)
    line = "MESHKIT_SEED=17 pytest '{}test_it.py::test_it[[]a b]'"  # a bracket in brackets, for fnmatch
    pytester.runpytest_inprocess("--tb=no").stdout.fnmatch_lines([line.format("tests/"), "*1 failed, 1 skipped*"])
    monkeypatch.chdir(folder)
    pytester.runpytest_inprocess("--tb=no").stdout.fnmatch_lines([line.format("")])

    monkeypatch.setenv("MESHKIT_SEED", "17")
    again = pytester.runpytest_inprocess("test_it.py::test_it[a b]").stdout
    again.fnmatch_lines(
        ["MESHKIT_SEED=17", "*=== repeat the simulations that failed ===*", line.format(""), "*1 failed*"]
    )
    monkeypatch.setenv("MESHKIT_SEED", "3")
    other = pytester.runpytest_inprocess("test_it.py::test_it[a b]").stdout
    other.fnmatch_lines(["MESHKIT_SEED=3", "*1 passed*"])
    other.no_fnmatch_line("*repeat the simulations*")


def test_the_line_names_the_file_of_the_test_also_from_elsewhere_and_where_it_is_inherited(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeini("[pytest]\naddopts = -p no:asyncio\npythonpath = .")
    pytester.makepyfile(base_of_these_tests=BASE)
    folder = pytester.mkdir("tests")
    (folder / "test_it.py").write_text("import base_of_these_tests\nclass TestIt(base_of_these_tests.Promises): ...")
    elsewhere = pytester.mkdir("elsewhere")
    monkeypatch.chdir(elsewhere)
    shown = pytester.runpytest_inprocess("--tb=no", folder).stdout
    shown.fnmatch_lines(["MESHKIT_SEED=5 pytest ../tests/test_it.py::TestIt::test_one"])


def test_who_interrupts_a_simulation_is_told_its_seed() -> None:
    @simulate(seeds=[7])
    async def test(sim: SimLoop) -> None:
        await asyncio.sleep(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        test()
    assert caught.value.__notes__[0].startswith("MESHKIT_SEED=7 ")
