import os
import pathlib
import subprocess
import sys

import pytest

from meshkit.testing import SimLoop, simulate, simulated
from tests.simulation.__main__ import play
from tests.simulation.cluster import scenario
from tests.simulation.mutants import MUTANTS, Mutant


@simulate(seeds=[0, 1, 2, 116], buggify=True)  # one that has failed once is added here
async def test_a_cluster_survives_a_storm(sim: SimLoop) -> None:
    await scenario(sim)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_fault_in_meshkit_is_found_within_200_seeds(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    mutant.patch(monkeypatch)
    wrong = (play(seed)[1] for seed in [mutant.seed, *range(200)])
    assert any(mutant.says in text for text in wrong)


# --- the same anywhere

PRINT_TRACE = """
from tests.simulation.test_cluster import short_trace
print(short_trace(7))
"""


def short_trace(seed: int) -> str:
    async def main(sim: SimLoop) -> str:
        await scenario(sim, storm=5.0)
        return sim.trace

    return simulated(seed, main, buggify=True)


def pythons() -> list[str]:
    """Return the interpreters that can run meshkit: this one, those that nox has made, and MESHKIT_PYTHONS."""
    root = pathlib.Path(__file__).parents[2]
    named = filter(None, os.environ.get("MESHKIT_PYTHONS", "").split(os.pathsep))
    return [sys.executable, *sorted(map(str, root.glob(".nox/tests-3-*/bin/python"))), *named]


def trace_of(python: str, hash_seed: str) -> str:
    root = pathlib.Path(__file__).parents[2]
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)}
    done = subprocess.run([python, "-c", PRINT_TRACE], capture_output=True, text=True, check=False, env=env, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("python", pythons())
def test_the_trace_of_the_cluster_is_the_same_in_every_process_and_on_every_python(python: str) -> None:
    assert trace_of(python, "1") == short_trace(7) != short_trace(8)
