import pathlib
import re

import meshkit
from meshkit._entropy import random_bytes, simulations

ROOT = pathlib.Path(meshkit.__file__).parent


def test_bytes_are_as_many_as_asked_for_and_never_the_same() -> None:
    assert not simulations
    assert [len(random_bytes(size)) for size in (0, 1, 16, 4096)] == [0, 1, 16, 4096]
    assert len({random_bytes(16) for _ in range(1000)}) == 1000


def test_nothing_else_asks_the_operating_system_or_a_simulation_would_not_obey_its_seed() -> None:
    others = re.compile(r"\burandom\b|^\s*(import|from) (secrets|uuid)\b|SystemRandom|token_(bytes|hex)", re.MULTILINE)
    found = {path.name for path in ROOT.rglob("*.py") if others.search(path.read_text(encoding="utf-8"))}
    assert found == {"_entropy.py"}
