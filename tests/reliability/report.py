"""What a scenario has measured, and which of its promises were kept."""

import math
import statistics
from collections.abc import Sequence


class Report:
    """Prints figures as they come. `broken` are the promises that were not kept.

    `quick` asks for a small version, for the tests: what depends on the speed of the machine is not judged then.
    """

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self.broken: list[str] = []

    def say(self, text: str) -> None:
        """Tell a figure of which nothing is promised."""
        print(f"        {text}", flush=True)

    def promise(self, text: str, kept: bool) -> None:
        """Tell what was promised, and whether that is so."""
        print(f"  {'ok   ' if kept else 'BROKEN'} {text}", flush=True)
        if not kept:
            self.broken.append(text)

    def within(self, what: str, seconds: Sequence[float], limit: float) -> None:
        """Tell how long it took, which is never longer than `limit` seconds; infinity: it never came to its end."""
        worst = max(seconds)
        text = f"{what}: median {_time(statistics.median(seconds))}, at most {_time(worst)} (limit {_time(limit)})"
        self.promise(text, worst <= limit or (self.quick and worst < math.inf))


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
