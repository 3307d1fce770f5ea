"""Deliveries: what waits in a mailbox: a message for one handler."""

from collections.abc import Callable, Hashable
from typing import Any, Literal

import anyio
import msgspec

from meshkit.runtime.graph import Handler
from meshkit.runtime.message import Message

__all__ = ["Delivery", "delivery_of", "fail"]


class Delivery(msgspec.Struct, eq=False):
    """A message on its way to one handler."""

    handler: Handler
    message: Message[Any]
    size: int
    is_call: bool = False
    key: Hashable = None
    number: int = 0  # the mailbox counts
    order_error: Exception | None = None  # why `order_by` has no key for it
    attempts: int = 1
    caller_waits: bool = True
    scope: anyio.CancelScope | None = None  # cancels the handler of a call, while it runs
    again: Message[Any] | None = None  # the same request came again while its handler was being cancelled

    @property
    def its_turn(self) -> str:
        """What comes next, for its story."""
        return "it began" if self.attempts == 1 else "it was handled again"


def delivery_of(handler: Handler, message: Message[Any], size: int = 0, *, is_call: bool = False) -> Delivery:
    """Return a delivery with the key that the behavior says."""
    delivery = Delivery(handler, message, size, is_call)
    if handler.order_by is not None:
        _order(delivery, handler.order_by)
    return delivery


def _order(delivery: Delivery, order_by: Literal["sender"] | Callable[[Message[Any]], Hashable]) -> None:
    try:
        delivery.key = (delivery.message.sender if order_by == "sender" else order_by(delivery.message),)
        hash(delivery.key)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001 - it fails as if the handler had raised it
        name = type(error).__name__
        delivery.key = None
        delivery.order_error = error if isinstance(error, Exception) else RuntimeError(f"it raised {name}")


def fail(error: Exception) -> None:
    """Raise `error`, as if the handler had raised it."""
    raise error
