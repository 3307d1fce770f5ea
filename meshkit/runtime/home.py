"""Homes: a task of its own for what has to be held open from elsewhere.

A task group, or a cancel scope, must be left by the task that entered it. A pytest fixture, an ASGI lifespan or a REPL
may enter in one task and leave in another. So the runtime lives in a task of its own, which others open and close.
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

import anyio

from meshkit.runtime.crew import begin

__all__ = ["Home"]


class Home:
    """Runs `live(home)` in a task of its own, which calls `opened` when it is ready and waits for `asked_to_close`."""

    def __init__(self, name: str, live: Callable[["Home"], Coroutine[Any, Any, None]]) -> None:
        self.loop = loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[bool] = loop.create_future()  # or whether it ended before that
        self._closing: asyncio.Future[None] = loop.create_future()
        self.task = begin(loop, functools.partial(live, self), name)
        self.task.add_done_callback(self._on_end)

    @property
    def is_open(self) -> bool:
        """Whether it has opened, now or before it ended."""
        return self._opened.done() and self._opened.result()

    @property
    def ended(self) -> bool:
        """Whether it has ended, or its loop was closed under it."""
        return self.task.done() or self.loop.is_closed()

    @property
    def need_not_close(self) -> bool:
        """Whether it ended before it was open (who opened it was told so), or its loop was closed under it."""
        return self.ended and not (self.task.done() and self.is_open)

    def _on_end(self, task: "asyncio.Task[None]") -> None:
        if not self._opened.done():
            self._opened.set_result(False)
        if not task.cancelled():
            task.exception()  # it is raised by whoever opens, closes or waits

    # --- from inside

    def opened(self) -> None:
        """Say that it is open."""
        self._opened.set_result(True)

    async def asked_to_close(self) -> None:
        """Wait until somebody asks it to close."""
        await self._closing

    # --- from outside

    async def open(self) -> None:
        """Wait until it is open; whoever is cancelled here takes it down with them.

        Raises:
            Exception: What `live` raised instead of becoming ready.
        """
        try:
            await asyncio.wait([self._opened])
        except asyncio.CancelledError:
            await self._hurry()
            raise
        if not self._opened.result():
            await self.task

    def ask_to_close(self) -> None:
        """Let it begin to close, without waiting."""
        if not self._closing.done():
            self._closing.set_result(None)

    def cut_short(self) -> None:
        """Cut short what it is doing, opening or closing, so that it goes on to the next step of its end."""
        self.task.cancel()

    async def close(self) -> None:
        """Close it and wait until it has ended; to be cancelled here means: hurry.

        Raises:
            Exception: What `live` raised.
        """
        self.ask_to_close()
        try:
            await self.wait()
        except asyncio.CancelledError:
            await self._hurry()
            raise

    async def wait(self) -> None:
        """Wait until it has ended.

        Raises:
            Exception: What `live` raised.
        """
        await asyncio.wait([self.task])
        if not self.task.cancelled():
            self.task.result()

    async def _hurry(self) -> None:
        """Wait until it has ended, however often this is cancelled; each time cuts one step of its end short."""
        with anyio.CancelScope(shield=True):
            while True:
                self.task.cancel()
                try:
                    await asyncio.wait([self.task])
                    return
                except asyncio.CancelledError:
                    continue
