"""The Encryptor's streams: any cut, any tampering, any way to stop, bounded memory, and turns for others."""

import asyncio
import gc
import io
import itertools
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given, strategies as st
from nacl import bindings as sodium

import meshkit.encryptor as module
from meshkit.encryptor import Encryptor
from meshkit.errors import BadSeal
from meshkit.testing import cancellation_points, run

CHUNK = 64 * 1024
SEALED_CHUNK = CHUNK + 17
HEADER = 24
KEY = bytes(range(32))
OLD = bytes(range(32, 64))

EDGES = [n * CHUNK + d for n in range(4) for d in (-1, 0, 1) if n * CHUNK + d >= 0]
sizes = st.one_of(st.sampled_from(EDGES), st.integers(0, 300), st.integers(0, 4 * CHUNK))


def pattern(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def cut(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """Cut `data` at these places (modulo its length); the pieces may be empty."""
    places = [0, *sorted(place % (len(data) + 1) for place in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places)]


async def collect(stream: AsyncIterator[bytes]) -> list[bytes]:
    return [piece async for piece in stream]


def sealed(data: bytes, aad: bytes = b"", encryptor: Encryptor | None = None) -> bytes:
    return b"".join(run(lambda: collect((encryptor or Encryptor(KEY)).seal_stream([data], aad))))


def opened(data: bytes, aad: bytes = b"", encryptor: Encryptor | None = None) -> bytes:
    return b"".join(run(lambda: collect((encryptor or Encryptor(KEY)).open_stream([data], aad))))


# --- what goes in comes out ---------------------------------------------------------------------------------


def bare_stream(data: bytes, aad: bytes) -> bytes:
    """Return `data` sealed as the format says, written down as simply as can be: the model."""
    state = sodium.crypto_secretstream_xchacha20poly1305_state()
    output = sodium.crypto_secretstream_xchacha20poly1305_init_push(state, KEY)
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)] or [b""]
    for chunk in chunks[:-1]:
        output += sodium.crypto_secretstream_xchacha20poly1305_push(state, chunk, aad)
    return output + sodium.crypto_secretstream_xchacha20poly1305_push(state, chunks[-1], aad, 3)


@given(size=sizes, aad=st.binary(max_size=20), cuts=st.lists(st.integers(0)), again=st.lists(st.integers(0)))
def test_however_it_is_cut_what_was_sealed_opens(size: int, aad: bytes, cuts: list[int], again: list[int]) -> None:
    data, encryptor = pattern(size), Encryptor(KEY)

    async def main() -> None:
        stream = b"".join(await collect(encryptor.seal_stream(cut(data, cuts), aad)))
        assert len(stream) == len(bare_stream(data, aad))
        pieces = await collect(encryptor.open_stream(cut(stream, again), aad))
        assert b"".join(pieces) == data
        assert all(pieces), "an empty piece is of no use to anybody"

    run(main)


@given(size=sizes, aad=st.binary(max_size=20), cuts=st.lists(st.integers(0)))
def test_it_opens_what_the_model_sealed(size: int, aad: bytes, cuts: list[int]) -> None:
    stream = bare_stream(pattern(size), aad)
    pieces = run(lambda: collect(Encryptor(KEY).open_stream(cut(stream, cuts), aad)))
    assert b"".join(pieces) == pattern(size)


@given(size=sizes, cuts=st.lists(st.integers(0)))
def test_the_core_holds_less_than_it_was_fed_and_never_more_than_a_chunk(size: int, cuts: list[int]) -> None:
    core = module._SealStream(KEY, b"")
    fed = put_out = 0
    for piece in cut(pattern(size), cuts):
        fed += len(piece)
        put_out += sum(max(0, len(output) - 17) for output in core.feed(piece))
        assert len(core._held) <= CHUNK
        assert put_out - (HEADER if put_out else 0) + len(core._held) == fed


def test_empty_streams_are_streams() -> None:
    for source in ([], [b""], [b"", b""]):
        stream = b"".join(run(lambda source=source: collect(Encryptor(KEY).seal_stream(source))))  # type: ignore[misc]
        assert len(stream) == HEADER + 17
        assert run(lambda stream=stream: collect(Encryptor(KEY).open_stream([stream]))) == []  # type: ignore[misc]


def test_a_source_may_be_async_and_of_anything_like_bytes() -> None:
    encryptor = Encryptor(KEY)

    async def source() -> AsyncIterator[bytes | bytearray | memoryview]:
        yield b"one "
        await asyncio.sleep(3600)
        yield bytearray(b"two ")
        yield memoryview(b"t_h_r_e_e_")[::2]

    async def main() -> bytes:
        return b"".join(await collect(encryptor.open_stream(encryptor.seal_stream(source(), b"aad"), b"aad")))

    assert run(main) == b"one two three"


def test_one_buffer_may_be_filled_again_and_again() -> None:
    encryptor = Encryptor(KEY)

    def source() -> Iterator[bytearray]:
        buffer = bytearray(1000)
        for number in range(200):
            buffer[:] = bytes([number]) * 1000
            yield buffer
            buffer.extend(b"x")  # fails if somebody still looks at it
            del buffer[1000:]

    stream = b"".join(run(lambda: collect(encryptor.seal_stream(source()))))
    assert opened(stream) == b"".join(bytes([number]) * 1000 for number in range(200))


def test_two_streams_of_the_same_data_differ() -> None:
    assert len({sealed(b"the same") for _ in range(100)}) == 100


def test_the_newest_key_seals_a_stream_and_any_key_opens_it() -> None:
    rotated = Encryptor(KEY, OLD)
    data = pattern(2 * CHUNK + 5)
    assert opened(sealed(data, encryptor=Encryptor(OLD)), encryptor=rotated) == data
    assert opened(sealed(data, encryptor=rotated)) == data
    with pytest.raises(BadSeal):
        opened(sealed(data, encryptor=rotated), encryptor=Encryptor(OLD))


def test_many_streams_at_once_do_not_mix() -> None:
    encryptor = Encryptor(KEY, OLD)

    async def one(number: int) -> bool:
        data = bytes([number]) * (number * 1500)

        async def source() -> AsyncIterator[bytes]:
            for start in range(0, len(data), 1000):
                await asyncio.sleep(number % 3)
                yield data[start : start + 1000]

        return b"".join(await collect(encryptor.open_stream(encryptor.seal_stream(source())))) == data

    async def main() -> list[bool]:
        return await asyncio.gather(*(one(number) for number in range(100)))

    assert all(run(main))


# --- what was changed does not open -------------------------------------------------------------------------


def yielded_before_the_bad_seal(stream: bytes, cuts: Iterable[int] = (), aad: bytes = b"") -> bytes:
    async def main() -> bytes:
        output = bytearray()
        with pytest.raises(BadSeal) as caught:
            async for piece in Encryptor(KEY, OLD).open_stream(cut(stream, cuts), aad):
                output += piece
        assert caught.value.__context__ is None
        assert vars(caught.value) == {}
        return bytes(output)

    return run(main)


@given(size=sizes, cuts=st.lists(st.integers(0), max_size=5), data=st.data())
def test_no_tampering_goes_unnoticed_and_what_was_yielded_is_true(size: int, cuts: list[int], data: Any) -> None:
    plaintext = pattern(size)
    stream = sealed(plaintext)
    header, body = stream[:HEADER], stream[HEADER:]
    chunks = [body[start : start + SEALED_CHUNK] for start in range(0, len(body), SEALED_CHUNK)]
    some = st.integers(0, len(chunks) - 1)
    how = data.draw(st.sampled_from(["flip", "truncate", "drop", "swap", "repeat", "append", "foreign", "header"]))
    if how == "flip":
        altered = bytearray(stream)
        altered[data.draw(st.integers(0, len(stream) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        wrong = bytes(altered)
    elif how == "truncate":
        wrong = stream[: data.draw(st.integers(0, len(stream) - 1))]
    elif how == "append":
        wrong = stream + data.draw(st.one_of(st.binary(min_size=1, max_size=100), st.just(stream), st.just(body)))
    elif how == "header":
        wrong = sealed(plaintext)[:HEADER] + body
    else:
        at, other = data.draw(some), data.draw(some)
        if how == "drop":
            del chunks[at]
        elif how == "swap":
            chunks[at], chunks[other] = chunks[other], chunks[at]
        elif how == "repeat":
            chunks.insert(data.draw(some), chunks[at])
        else:
            chunks[at] = sealed(plaintext)[HEADER + at * SEALED_CHUNK :][:SEALED_CHUNK]
        wrong = header + b"".join(chunks)
    if wrong == stream:
        return  # a swap with itself
    true = yielded_before_the_bad_seal(wrong, cuts)
    assert plaintext.startswith(true)
    assert len(true) < len(plaintext) or not plaintext


@given(garbage=st.binary(max_size=200), cuts=st.lists(st.integers(0), max_size=5))
def test_garbage_is_no_stream(garbage: bytes, cuts: list[int]) -> None:
    assert yielded_before_the_bad_seal(garbage, cuts) == b""


def test_a_stream_opens_only_with_its_own_aad_and_key() -> None:
    stream = sealed(pattern(CHUNK + 1), b"for bob")
    assert yielded_before_the_bad_seal(stream, aad=b"for eve") == b""
    assert yielded_before_the_bad_seal(stream) == b""
    with pytest.raises(BadSeal):
        opened(stream, b"for bob", Encryptor(OLD))


def test_a_message_is_no_stream_and_a_stream_is_no_message() -> None:
    encryptor = Encryptor(KEY)
    assert yielded_before_the_bad_seal(encryptor.seal_combined(b"a message")) == b""
    with pytest.raises(BadSeal):
        encryptor.open_combined(sealed(b"a stream"))


def test_a_chunk_of_another_size_in_the_middle_is_not_of_this_format() -> None:
    state = sodium.crypto_secretstream_xchacha20poly1305_state()
    stream = sodium.crypto_secretstream_xchacha20poly1305_init_push(state, KEY)
    stream += sodium.crypto_secretstream_xchacha20poly1305_push(state, b"short", b"")
    stream += sodium.crypto_secretstream_xchacha20poly1305_push(state, b"last", b"", 3)
    assert yielded_before_the_bad_seal(stream) == b""


@pytest.mark.parametrize("wrong", [None, 7, "text", [1, 2], object()])
def test_items_and_aad_of_a_wrong_type(wrong: Any) -> None:
    encryptor = Encryptor(KEY)
    kind = type(wrong).__name__
    with pytest.raises(TypeError, match=f"^a chunk must be bytes, not {kind}$"):
        run(lambda: collect(encryptor.seal_stream([b"good", wrong])))
    with pytest.raises(TypeError, match=f"^aad must be bytes, not {kind}$"):
        encryptor.seal_stream([b"good"], wrong)
    with pytest.raises(BadSeal) as caught:
        run(lambda: collect(encryptor.open_stream([wrong])))
    assert caught.value.__context__ is None
    with pytest.raises(BadSeal):
        encryptor.open_stream([b"good"], wrong)


@pytest.mark.parametrize("data", [b"all of it", bytearray(b"all of it"), memoryview(b"all of it")])
def test_bytes_in_place_of_an_iterable_of_bytes_are_pointed_out(data: Any) -> None:
    encryptor = Encryptor(KEY)
    for stream in (encryptor.seal_stream(data), encryptor.open_stream(data)):
        with pytest.raises(TypeError, match=f"chunks must be an iterable of bytes, .* not {type(data).__name__}"):
            run(lambda stream=stream: collect(stream))  # type: ignore[misc]


def test_what_is_no_iterable_is_a_type_error() -> None:
    for wrong in (None, 7, object()):
        with pytest.raises(TypeError, match="not iterable"):
            run(lambda wrong=wrong: collect(Encryptor(KEY).open_stream(wrong)))  # type: ignore[misc]


# --- every way to stop closes the source --------------------------------------------------------------------


class Source:
    """A source, plain or async, of `count` items; it knows whether its generator was closed, and when."""

    def __init__(self, items: Iterable[bytes], error: BaseException | None = None) -> None:
        self.items = list(items)
        self.error = error
        self.closed = 0

    def plain(self) -> Iterator[bytes]:
        try:
            yield from self.items
            if self.error:
                raise self.error
        finally:
            self.closed += 1

    async def waiting(self) -> AsyncGenerator[bytes, None]:
        try:
            for item in self.items:
                await asyncio.sleep(1)
                yield item
            if self.error:
                raise self.error
        finally:
            self.closed += 1

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for item in self.waiting():
            yield item


@pytest.mark.parametrize("kind", ["plain", "waiting"])
def test_a_source_that_is_used_up_is_closed_once(kind: str) -> None:
    source = Source([b"x" * CHUNK] * 3)
    run(lambda: collect(Encryptor(KEY).seal_stream(getattr(source, kind)())))
    assert source.closed == 1


@pytest.mark.parametrize("kind", ["plain", "waiting"])
def test_whoever_stops_half_way_closes_the_source_with_the_stream(kind: str) -> None:
    source = Source([b"x" * CHUNK] * 3)

    async def main() -> None:
        async with aclosing(Encryptor(KEY).seal_stream(getattr(source, kind)())) as stream:
            async for _ in stream:
                break
            assert source.closed == 0
        assert source.closed == 1

    run(main)


def test_an_iterable_that_makes_an_async_generator_has_that_closed() -> None:
    source = Source([b"x" * CHUNK] * 3)

    async def main() -> None:
        stream = Encryptor(KEY).seal_stream(source)
        await anext(stream)
        await stream.aclose()
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    run(main)
    gc.collect()
    assert source.closed == 1


@pytest.mark.parametrize("kind", ["plain", "waiting"])
def test_a_bad_seal_closes_the_source(kind: str) -> None:
    source = Source([b"x" * CHUNK] * 3)
    with pytest.raises(BadSeal):
        run(lambda: collect(Encryptor(KEY).open_stream(getattr(source, kind)())))
    assert source.closed == 1


@pytest.mark.parametrize("kind", ["plain", "waiting"])
@pytest.mark.parametrize("error", [ConnectionResetError("lost"), KeyboardInterrupt(), asyncio.CancelledError()])
def test_what_the_source_raises_is_raised_untouched(kind: str, error: BaseException) -> None:
    source = Source([b"x" * CHUNK], error)
    caught: list[BaseException] = []

    async def main() -> None:
        try:
            await collect(Encryptor(KEY).seal_stream(getattr(source, kind)()))
        except BaseException as raised:  # noqa: BLE001 - it is what is tested
            caught.append(raised)

    run(main)
    assert caught == [error]
    assert source.closed == 1


def test_files_stay_open() -> None:
    file = io.BytesIO(b"line\n" * 10)
    assert opened(b"".join(run(lambda: collect(Encryptor(KEY).seal_stream(file))))) == b"line\n" * 10
    file.seek(0)
    with pytest.raises(BadSeal):
        run(lambda: collect(Encryptor(KEY).open_stream(file)))
    assert not file.closed


class Connection:
    """An async iterator that can be closed, and is not a generator."""

    def __init__(self, items: Iterable[bytes]) -> None:
        self.items = iter(items)
        self.closed = False

    def __aiter__(self) -> "Connection":
        return self

    async def __anext__(self) -> bytes:
        await asyncio.sleep(1)
        for item in self.items:
            return item
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.closed = True


def test_connections_stay_open() -> None:
    connection = Connection([b"x" * CHUNK] * 3)
    stream = run(lambda: collect(Encryptor(KEY).seal_stream(connection)))
    assert opened(b"".join(stream)) == b"x" * (3 * CHUNK)
    assert not connection.closed


def test_a_stream_that_nobody_reads_costs_nothing_and_warns_of_nothing() -> None:
    async def main() -> None:
        source = Source([b"x"])
        stream = Encryptor(KEY).seal_stream(source.plain())
        await stream.aclose()
        del stream
        gc.collect()

    run(main)


@pytest.mark.parametrize("name", ["seal_stream", "open_stream"])
@pytest.mark.parametrize("kind", ["plain", "waiting"])
def test_cancelled_at_any_await_the_source_is_closed_and_what_came_out_is_a_prefix(name: str, kind: str) -> None:
    data = pattern(1_200_000)
    stream = sealed(data)
    items = cut(data if name == "seal_stream" else stream, [300_000, 600_000, 900_000])
    outcomes = set()
    for point in cancellation_points():
        source = Source(items)
        encryptor = Encryptor(KEY)
        output: list[bytes] = []

        async def copy(source: Source = source, output: list[bytes] = output, encryptor: Any = encryptor) -> None:
            async with aclosing(getattr(encryptor, name)(getattr(source, kind)())) as pieces:
                async for piece in pieces:
                    await asyncio.sleep(0.1)  # as a consumer that writes it somewhere
                    output.append(piece)

        async def main(point: Any = point, copy: Any = copy) -> bool:
            cancelled: bool = await point.cancel(copy())
            return cancelled

        cancelled = run(main)
        outcomes.add(cancelled)
        assert source.closed == 1
        if name == "open_stream":
            assert data.startswith(b"".join(output))
            assert cancelled or b"".join(output) == data
        elif point.moment == "waiting" and cancelled and output:  # in one of the three ways: it takes its time
            assert data.startswith(yielded_before_the_bad_seal(b"".join(output)))
    assert outcomes == {True, False}


# --- memory, and turns for others ---------------------------------------------------------------------------


@pytest.mark.parametrize("item", [b"", b"x", b"x" * 1000, b"x" * CHUNK, b"x" * 8_000_000], ids=len)
def test_a_source_that_never_waits_does_not_starve_the_loop(item: bytes) -> None:
    count = 9_000 if len(item) < 10_000 else 16_000_000 // len(item)
    work = count * (len(item) + 256)

    async def main() -> tuple[int, int]:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        encryptor = Encryptor(KEY)
        task = asyncio.create_task(others())
        await asyncio.sleep(0)
        stream = await collect(encryptor.seal_stream(item for _ in range(count)))
        sealing, turns = turns, 0
        cut_the_same = [b"".join(stream)] if len(item) > CHUNK else cut(b"".join(stream), range(0, work, 256))
        assert sum(map(len, await collect(encryptor.open_stream(cut_the_same)))) == count * len(item)
        task.cancel()
        return sealing, turns

    sealing, opening = run(main)
    assert sealing >= work // (1024 * 1024 + CHUNK + 256)
    assert opening >= count * len(item) // (1024 * 1024 + CHUNK + 256)


def test_memory_is_bounded_by_an_item_and_a_few_chunks() -> None:
    encryptor = Encryptor(KEY, OLD)

    async def main() -> int:
        total = 0
        plain = (bytes(100_000) for _ in range(300))
        async for piece in encryptor.open_stream(encryptor.seal_stream(plain)):
            total += len(piece)
        return total

    tracemalloc.start()
    try:
        total = run(main)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == 30_000_000
    assert peak < 1_500_000
