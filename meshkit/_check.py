"""Argument checks: what a constructor is given is checked once, and the error names the argument and the value."""

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

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


def errors(
    name: str, value: Any, *, none: str
) -> tuple[tuple[type[Exception], ...], Callable[[Exception], bool] | None]:
    """Return `value` as classes of errors and a predicate, one of which is missing; `none` says why not none."""
    if callable(value) and not isinstance(value, type):
        if inspect.iscoroutinefunction(value) or inspect.iscoroutinefunction(value.__call__):
            raise TypeError(f"{name} must be a plain function, whose answer is there at once, not {value!r}")
        return (), cast("Callable[[Exception], bool]", value)
    classes: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)  # pyright: ignore[reportUnknownVariableType]  # judged below
    if not classes:
        raise ValueError(f"{name} must name at least one exception class: {none}")
    for c in classes:
        if not (isinstance(c, type) and issubclass(c, Exception)):
            raise TypeError(
                f"{name} must name classes of Exception (cancellations are not for it), one or a tuple of them, "
                f"not {c!r}"
            )
        if issubclass(c, ExceptionGroup):
            raise TypeError(f"{name} is asked about each error in a group: name those, not {c.__name__}")
    return classes, None
