"""Argument checks: what a constructor is given is checked once, and the error names the argument and the value."""

import dataclasses
import inspect
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def duration(name: str, value: float, *, zero: bool = False) -> float:
    """Return `value` in seconds as a float; it must be finite and positive (or zero, where `zero` allows it)."""
    if type(value) is float and 0 < value <= sys.float_info.max:  # nearly always: each call has a timeout
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    if not 0 <= value <= sys.float_info.max or (value == 0 and not zero):  # so neither NaN nor an int beyond floats
        least = "zero or more" if zero else "more than zero"
        raise ValueError(f"{name} must be finite and {least} seconds, not {value!r}")
    return float(value)


def count(name: str, value: int, *, minimum: int = 1) -> int:
    """Return `value`, a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, not {value!r}")
    return value


def ratio(name: str, value: float) -> float:
    """Return `value` as a float more than 0 and at most 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be more than 0 and at most 1, not {value!r}")
    return float(value)


def not_a_function(fn: object) -> TypeError:
    """Return the error for who gives a guard something that cannot be called: as a rule, a call that was begun already.

    Whether it can be is asked where the call is, `if not callable(fn)`: that costs a tenth of a call of this function.
    """
    if not inspect.iscoroutine(fn):
        return TypeError(f"the first argument must be an async function, not {fn!r}")
    fn.close()  # else Python warns as well that it was never awaited
    name = fn.__name__
    return TypeError(
        f"the first argument must be an async function, not a call of it: ({name}, x), and not ({name}(x))"
    )


def limits(these: "DataclassInstance") -> None:
    """Check the fields of a dataclass: those called `max_...` are counts, the others durations."""
    for field in dataclasses.fields(these):
        (count if field.name.startswith("max_") else duration)(field.name, getattr(these, field.name))
