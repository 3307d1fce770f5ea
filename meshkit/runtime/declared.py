"""Declared types: what a behavior says that its payload or reply is, and how that is checked and decoded."""

import contextlib
import functools
import types
import typing
from typing import Any, Generic, TypeVar

import msgspec

from meshkit.runtime.wire import require_portable

__all__ = ["Declared"]

T = TypeVar("T")


class Declared(Generic[T]):
    """One declared type. `what` is what errors call it: "stash:store: the payload"."""

    def __init__(self, what: str, declared: type[T]) -> None:
        given: object = declared  # callers without a type checker give anything
        if not (isinstance(given, type) or typing.get_origin(given) is not None or given is Any):
            hint = "; where there is none, give type(None)" if given is None else ""
            raise TypeError(f"{what} must be a type, not {declared!r}{hint}")
        self._declared = declared
        self._what = what
        self._class = _checkable(declared)

    def __str__(self) -> str:
        declared: object = self._declared
        return declared.__name__ if isinstance(declared, type) and not typing.get_origin(declared) else str(declared)

    @functools.cached_property
    def decoder(self) -> msgspec.msgpack.Decoder[T]:
        """What decodes it, checking every field. Made at first use, when all types are defined.

        Raises:
            TypeError: It cannot travel.
        """
        require_portable(self._declared)
        return msgspec.msgpack.Decoder(self._declared)

    def check(self, value: object) -> None:
        """Raise `TypeError` unless `value` is of the declared type, as far as `isinstance` can tell."""
        if not isinstance(value, self._class):
            raise TypeError(f"{self._what} must be {self}, not {type(value).__name__}")


def _checkable(declared: object) -> Any:
    """Return what `isinstance` can check `declared` by: list for list[int]; object, where nothing can.

    An int will do for a float, as it does for type checkers.
    """
    if declared is float:
        return (float, int)
    for candidate in (declared, typing.get_origin(declared)):
        if isinstance(candidate, type) and candidate not in {Any, types.UnionType, typing.Annotated}:
            with contextlib.suppress(TypeError):  # parametrised, or a protocol: not for isinstance
                isinstance(None, candidate)
                return candidate
    return object
