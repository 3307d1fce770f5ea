"""Where ids, keys and nonces come from: the operating system, or the seed of the simulation that runs.

Jitter is drawn with Python's `random` instead, which a `meshkit.testing.SimLoop` seeds while it runs.
"""

import asyncio
import os
import random
from collections.abc import Callable

from meshkit._time import running_loop

simulations: dict[asyncio.AbstractEventLoop | None, random.Random] = {}
"""The simulated loops that run now, and what they draw from: only `meshkit.testing` puts any here."""
buggified: dict[asyncio.AbstractEventLoop | None, Callable[[str], bool]] = {}
"""Those of them in which points of `meshkit.buggify` fire, and what says whether one does."""


class Secret(bytes):
    """Bytes that do not show themselves, and are bytes for libsodium."""

    def __repr__(self) -> str:
        return "<secret>"

    __str__ = __repr__


def random_bytes(size: int) -> bytes:
    """Return `size` bytes that nobody can guess; in a simulation, the next ones of its seed."""
    rng = simulations.get(running_loop()) if simulations else None
    return os.urandom(size) if rng is None else rng.randbytes(size)
