"""Which points of `meshkit.buggify` fire in a simulation.

The way of FoundationDB: J. Zhou et al., "FoundationDB: A Distributed Unbundled Transactional Key Value Store", 2021.
"""

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshkit.testing.sim_loop import SimLoop


class Faults:
    """Draws from the seed which points are armed, and when an armed one fires.

    So some seeds have much of one fault and none of another, which finds what a little of everything would hide. Each
    point draws from a stream of its own: one that is added does not change what is drawn for the others.
    """

    ARMED = 0.25
    """The probability that a point is armed in a simulation."""
    FIRES = 0.25
    """The probability that an armed point fires, each time."""

    def __init__(self, loop: "SimLoop") -> None:
        self._loop = loop
        self._points: dict[str, random.Random | None] = {}  # None: not armed

    def fires(self, point: str) -> bool:
        """Return whether `point` fires now; if so, it is counted in `fired` and in the trace of the loop."""
        if point not in self._points:
            rng = self._loop.stream(f"buggify {point}")
            self._points[point] = rng if rng.random() < self.ARMED else None
        armed = self._points[point]
        if armed is None or armed.random() >= self.FIRES:
            return False
        self._loop.fired[point] += 1
        self._loop.note(f"buggify {point}")
        return True
