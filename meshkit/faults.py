"""Points at which a simulation lets happen what is allowed but rare: `buggify`, as FoundationDB calls it.

Most of what goes wrong with a service goes wrong in moments that hardly ever come: a buffer is full, a worker is slow,
a write is cut short. Put a point there, and simulations with `buggify=True` see those moments all the time:

>>> batch = 1 if buggify("shop: small batches") else 500
>>> batch
500
"""

from meshkit._entropy import buggified
from meshkit._time import running_loop

__all__ = ["buggify"]


def buggify(point: str) -> bool:
    """Return whether what `point` names is to happen now: always False, but in a simulation that asks for it.

    What happens then must be allowed at any time, as a delay, a retry or a refusal is; it may not break a promise.
    `point` is a constant, unique in the program: a simulation remembers each. Cost elsewhere: one look at a dict.
    """
    if not buggified:
        return False
    fires = buggified.get(running_loop())
    return fires is not None and fires(point)
