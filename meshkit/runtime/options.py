"""Options: what a behavior may declare beside its types, and what is checked when it does."""

import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, Literal, TypeAlias, TypedDict, TypeVar, get_args

from meshkit import _check
from meshkit.retrier import RetryPolicy
from meshkit.runtime.message import Message
from meshkit.runtime.stages import Stage

__all__ = ["OnError", "Options", "Overflow", "check_options"]

P = TypeVar("P")

OnError: TypeAlias = Literal["log", "drop", "dead_letter", "raise"]
Overflow: TypeAlias = Literal["refuse", "wait", "drop_newest", "drop_oldest"]


class Options(TypedDict, Generic[P], total=False):
    """What a behavior may declare beside its types. `Behavior` says what each means."""

    content_key: Callable[[P], Hashable] | None
    remember: float | None
    rate_limit: tuple[int, float] | None
    filter: Callable[[Message[P]], bool] | None
    order_by: Literal["sender"] | Callable[[Message[P]], Hashable] | None
    max_mailbox: int | None
    max_concurrent: int | None
    overflow: Overflow
    retry: RetryPolicy | None
    on_error: OnError
    stages: Sequence[Stage]


def check_options(options: Any, overflows: Sequence[Overflow]) -> None:
    """Check the options that a behavior holds as its attributes, each for itself.

    Raises:
        TypeError, ValueError: One cannot be; the message names it, and its value.
    """
    match options.rate_limit:
        case None:
            pass
        case (max_count, window) if isinstance(options.rate_limit, tuple):
            _check.count("max_count of rate_limit", max_count)
            _check.duration("window of rate_limit", window)
        case other:
            raise TypeError(f"rate_limit must be (max_count, window), not {other!r}")
    if options.remember is not None:
        _check.duration("remember", options.remember)
    for name in ("max_mailbox", "max_concurrent"):
        if getattr(options, name) is not None:
            _check.count(name, getattr(options, name))
    for name in ("content_key", "filter", "order_by", "upgrade"):
        value = getattr(options, name)
        if name == "order_by" and value == "sender":
            continue
        if value is not None and (not callable(value) or inspect.iscoroutinefunction(value)):
            also = '"sender", or ' if name == "order_by" else ""
            raise TypeError(f"{name} must be {also}a function that is not async, not {value!r}")
    if options.overflow is not None and options.overflow not in overflows:
        raise ValueError(f"overflow must be {' or '.join(overflows)} for this kind, not {options.overflow!r}")
    if options.retry is not None and not isinstance(options.retry, RetryPolicy):
        raise TypeError(f"retry must be a RetryPolicy, not {options.retry!r}")
    if options.retry is not None and (options.retry.timeout or options.retry.attempt_timeout):
        raise ValueError("retry is bounded by max_retries and the caller's deadline: it takes no timeouts")
    if options.on_error not in get_args(OnError):
        raise ValueError(f"on_error must be one of {', '.join(get_args(OnError))}, not {options.on_error!r}")
    for stage in options.stages:
        if not isinstance(stage, Stage):
            raise TypeError(f"stages must be of Stage(name, run), not {stage!r}")
    names = [stage.name for stage in options.stages]
    if len(set(names)) < len(names):
        raise ValueError(f"two stages of the same name: {', '.join(names)}")
