"""Bytes of any sizes in, chunks of one size out, converted; from a source of any kind, with turns for others.

>>> class Shout(Chunks):
...     def convert(self, chunk, *, last):
...         return chunk.upper() + (b"!" if last else b", ")
>>> async def main():
...     return [piece async for piece in converted(Shout(4, 4), [b"ab", b"cdefg", b"h"])]
>>> asyncio.run(main())
[b'ABCD, ', b'EFGH!']
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Iterator
from typing import Any, TypeAlias

from meshkit.errors import BadSeal

__all__ = ["BytesLike", "Chunks", "Source", "as_bytes", "converted", "size_of"]

BytesLike: TypeAlias = bytes | bytearray | memoryview
Source: TypeAlias = AsyncIterable[BytesLike] | Iterable[BytesLike]

_TURN = 1024 * 1024  # bytes of work, about a millisecond, after which a stream lets others run
_ITEM = 256  # how many bytes of work it is to handle one item of the source, however small


def size_of(value: Any) -> int:
    """Return how many bytes `value` holds; -1 if it is not like bytes, which is whatever has the buffer protocol."""
    try:
        return memoryview(value).nbytes
    except Exception:  # noqa: BLE001 - since Python 3.12 anybody's __buffer__ is asked, which may raise what it likes
        return -1


def as_bytes(value: Any, name: str = "") -> bytes:
    """Return `value` as bytes. Without a name it came from anybody, and what is wrong with it is a `BadSeal`."""
    if type(value) is bytes:
        return value
    if size_of(value) < 0:
        raise TypeError(f"{name} must be bytes, not {type(value).__name__}") if name else BadSeal()
    return memoryview(value).tobytes()


class Chunks(ABC):
    """The core of a stream: bytes go in as they come, chunks of a fixed size are converted and come out.

    A chunk is held until another byte follows it, or none: it must be known which is the last.
    """

    def __init__(self, first: int, size: int) -> None:
        self._wanted, self._size = first, size  # how long the next chunk is, and all after it
        self._held = bytearray()  # one chunk at most

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield every chunk that is complete, converted, and b"" when `data` is used up."""
        view, start = memoryview(data), 0
        while (end := start + self._wanted - len(self._held)) < len(view):
            chunk = b"".join((self._held, view[start:end]))
            self._held.clear()
            start, self._wanted = end, self._size
            yield self.convert(chunk, last=False)
        self._held += view[start:]
        yield b""

    def finish(self) -> bytes:
        """Return the last chunk, converted."""
        return self.convert(bytes(self._held), last=True)

    @abstractmethod
    def convert(self, chunk: bytes, *, last: bool) -> bytes:
        """Return what becomes of `chunk`."""


async def converted(core: Chunks, chunks: Source, name: str = "") -> AsyncGenerator[bytes, None]:
    """Yield what comes out of `core` when `chunks` go in; close them if they are a generator."""
    if size_of(chunks) >= 0:
        raise TypeError(f"chunks must be an iterable of bytes, plain or async, not {type(chunks).__name__}: [chunk]")
    items = aiter(chunks) if isinstance(chunks, AsyncIterable) else _one_by_one(chunks)
    work = 0
    try:
        async for item in items:
            work += _ITEM
            for output in core.feed(as_bytes(item, name)):
                if output:
                    yield output
                work += len(output)
                if work >= _TURN:
                    work = 0
                    await asyncio.sleep(0)
        if output := core.finish():
            yield output
    finally:
        # Nobody else has a use for a half-read generator. A file or connection is for whoever opened it to close.
        if isinstance(items, AsyncGenerator):
            await items.aclose()


async def _one_by_one(chunks: Iterable[BytesLike]) -> AsyncGenerator[BytesLike, None]:
    items = iter(chunks)
    try:
        for item in items:
            yield item
    finally:
        if isinstance(items, Generator):
            items.close()
