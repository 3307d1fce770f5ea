"""The Encryptor: messages, keys, derivation, what must never show, and large messages in threads."""

import array
import asyncio
import contextlib
import copy
import pickle
import pprint
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import pytest
from hypothesis import given, strategies as st

import meshkit.encryptor as module
from meshkit.encryptor import Encryptor, Sealed
from meshkit.errors import BadSeal
from meshkit.testing import cancellation_points, run

KEY = bytes(range(32))
OLD = bytes(range(32, 64))
OLDER = bytes(range(64, 96))
SECRET = b"a secret of some length"
SENTENCE = "The sealed bytes could not be opened."

keys = st.binary(min_size=32, max_size=32).filter(any)


# --- sealing and opening ------------------------------------------------------------------------------------


@given(key=keys, plaintext=st.binary(max_size=500), aad=st.binary(max_size=100))
def test_what_was_sealed_opens(key: bytes, plaintext: bytes, aad: bytes) -> None:
    encryptor = Encryptor(key)
    sealed = encryptor.seal(plaintext, aad)
    assert encryptor.open(*sealed, aad) == plaintext
    assert encryptor.open_combined(encryptor.seal_combined(plaintext, aad), aad) == plaintext
    assert len(sealed.nonce) == 24
    assert len(sealed.ciphertext) == len(plaintext) + 16


def test_the_combined_form_is_the_nonce_and_then_the_ciphertext() -> None:
    encryptor = Encryptor(KEY)
    sealed = encryptor.seal(b"data", b"aad")
    assert encryptor.open_combined(sealed.nonce + sealed.ciphertext, b"aad") == b"data"
    combined = encryptor.seal_combined(b"data", b"aad")
    assert encryptor.open(combined[:24], combined[24:], b"aad") == b"data"


def test_every_seal_has_a_fresh_nonce() -> None:
    encryptor = Encryptor(KEY)
    assert len({encryptor.seal(b"the same").nonce for _ in range(10_000)}) == 10_000


@given(plaintext=st.binary(max_size=50), aad=st.binary(max_size=20), at=st.integers(0), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_a_bad_seal(plaintext: bytes, aad: bytes, at: int, bit: int) -> None:
    encryptor = Encryptor(KEY, OLD)
    combined = encryptor.seal_combined(plaintext, aad)
    altered = bytearray(combined + aad)
    altered[at % len(altered)] ^= 1 << bit
    with pytest.raises(BadSeal):
        encryptor.open_combined(altered[: len(combined)], altered[len(combined) :])


@given(plaintext=st.binary(max_size=50), length=st.integers(0))
def test_a_cut_or_lengthened_seal_is_a_bad_seal(plaintext: bytes, length: int) -> None:
    encryptor = Encryptor(KEY)
    combined = encryptor.seal_combined(plaintext)
    for wrong in (combined[: length % len(combined)], combined + b"\0"):
        with pytest.raises(BadSeal):
            encryptor.open_combined(wrong)


def buffers(data: bytes) -> list[Any]:
    """Return `data` as everything that counts as bytes."""

    class Bytes(bytes):
        pass

    every_second = memoryview(b"".join(bytes([byte, 0]) for byte in data))[::2]
    return [data, bytearray(data), memoryview(data), Bytes(data), array.array("B", data), every_second]


def test_whatever_is_like_bytes_is_taken() -> None:
    encryptor = Encryptor(KEY)
    for plaintext, aad in zip(buffers(b"data"), buffers(b"aad"), strict=True):
        sealed = encryptor.seal(plaintext, aad)
        for nonce, ciphertext, same in zip(buffers(sealed[0]), buffers(sealed[1]), buffers(b"aad"), strict=True):
            assert encryptor.open(nonce, ciphertext, same) == b"data"
        for combined in buffers(encryptor.seal_combined(plaintext, aad)):
            opened = encryptor.open_combined(combined, aad)
            assert opened == b"data"
            assert type(opened) is bytes


def released() -> memoryview:
    view = memoryview(b"x" * 40)
    view.release()
    return view


WRONG: list[Any] = [None, 0, 7, 1.5, "text" * 10, [1, 2], {}, object(), released(), Sealed(b"", b""), b"", b"x" * 15]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: type(value).__name__)
def test_whatever_comes_from_the_wire_there_is_one_error_with_one_text(wrong: Any) -> None:
    encryptor = Encryptor(KEY, OLD)
    sealed = encryptor.seal(b"data", b"aad")
    attempts: list[Callable[[], bytes]] = [
        lambda: encryptor.open(wrong, sealed.ciphertext, b"aad"),
        lambda: encryptor.open(sealed.nonce, wrong, b"aad"),
        lambda: encryptor.open(*sealed, wrong),
        lambda: encryptor.open_combined(wrong, b"aad"),
        lambda: encryptor.open_combined(b"".join(sealed), wrong),
        lambda: run(lambda: encryptor.open_large(sealed.nonce, wrong, b"aad")),
        lambda: Encryptor(OLD).open(*sealed, b"aad"),
    ]
    for attempt in attempts:
        with pytest.raises(BadSeal) as caught:
            attempt()
        assert str(caught.value) == SENTENCE
        assert vars(caught.value) == {}
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
        assert not hasattr(caught.value, "__notes__")


class Raises:
    """Whatever is asked of it, and since Python 3.12 that may be its bytes, it raises."""

    def __raise(self, *_: object) -> Any:
        raise KeyError("hostile")

    __buffer__ = __len__ = __iter__ = __eq__ = __bytes__ = __repr__ = __getattr__ = __raise
    __hash__ = None  # type: ignore[assignment]


def test_a_hostile_object_is_a_bad_seal_like_any_other() -> None:
    encryptor = Encryptor(KEY)
    sealed, hostile = encryptor.seal(b"data"), cast("bytes", Raises())
    attempts: list[Callable[[], object]] = [
        lambda: encryptor.open(hostile, sealed.ciphertext),
        lambda: encryptor.open(sealed.nonce, hostile),
        lambda: encryptor.open(*sealed, hostile),
        lambda: encryptor.open_combined(hostile),
        lambda: run(lambda: encryptor.open_large(sealed.nonce, hostile)),
        lambda: run(lambda: first(encryptor.open_stream([hostile]))),
    ]
    for attempt in attempts:
        with pytest.raises(BadSeal) as caught:
            attempt()
        assert caught.value.__context__ is None
    with pytest.raises(TypeError, match=r"^plaintext must be bytes, not Raises$"):
        encryptor.seal(hostile)


anything = st.one_of(st.none(), st.integers(), st.text(), st.binary(max_size=80), st.lists(st.integers(0, 255)))


@given(nonce=anything, ciphertext=anything, aad=anything)
def test_garbage_is_a_bad_seal(nonce: Any, ciphertext: Any, aad: Any) -> None:
    with pytest.raises(BadSeal):
        Encryptor(KEY).open(nonce, ciphertext, aad)
    with pytest.raises(BadSeal):
        Encryptor(KEY).open_combined(ciphertext, aad)


@pytest.mark.parametrize("wrong", [None, 7, "text", [1, 2], Sealed(b"", b"")])
def test_sealing_something_else_than_bytes_is_an_error_of_the_program(wrong: Any) -> None:
    encryptor = Encryptor(KEY)
    kind = type(wrong).__name__
    for verb in (encryptor.seal, encryptor.seal_combined, lambda *args: run(lambda: encryptor.seal_large(*args))):
        with pytest.raises(TypeError, match=f"^plaintext must be bytes, not {kind}$"):
            verb(wrong)
        with pytest.raises(TypeError, match=f"^aad must be bytes, not {kind}$"):
            verb(b"", wrong)


# --- keys ---------------------------------------------------------------------------------------------------


def test_the_newest_key_seals_and_any_key_opens() -> None:
    old, rotated, dropped = Encryptor(OLD), Encryptor(KEY, OLD, OLDER), Encryptor(KEY)
    assert rotated.open(*old.seal(b"data")) == b"data"
    assert rotated.open(*Encryptor(OLDER).seal(b"data")) == b"data"
    assert dropped.open(*rotated.seal(b"data")) == b"data"
    with pytest.raises(BadSeal):
        dropped.open(*old.seal(b"data"))
    with pytest.raises(BadSeal):
        old.open(*rotated.seal(b"data"))


def test_generated_keys_are_32_random_bytes() -> None:
    generated = {Encryptor.generate_key() for _ in range(100)}
    assert len(generated) == 100
    assert {len(key) for key in generated} == {32}
    assert {type(key) for key in generated} == {bytes}


@pytest.mark.parametrize(
    ("given_keys", "kind", "message"),
    [
        ((KEY[:31],), ValueError, "key must be exactly 32 bytes, not 31"),
        ((KEY * 2,), ValueError, "key must be exactly 32 bytes, not 64"),
        ((b"",), ValueError, "key must be exactly 32 bytes, not 0"),
        ((KEY, OLD[:16]), ValueError, "older[0] must be exactly 32 bytes, not 16"),
        ((KEY, OLD, OLDER[:16]), ValueError, "older[1] must be exactly 32 bytes, not 16"),
        ((KEY.hex(),), TypeError, "key must be exactly 32 bytes, not str; decode text first"),
        ((KEY, None), TypeError, "older[0] must be exactly 32 bytes, not NoneType; decode text first"),
        ((bytearray(KEY),), TypeError, "key must be exactly 32 bytes, not bytearray; decode text first"),
        ((bytes(32),), ValueError, "key is all zeros: it was never filled in"),
        ((KEY, bytes(32)), ValueError, "older[0] is all zeros: it was never filled in"),
        ((KEY, OLD, KEY), ValueError, "the same key was given twice"),
        ((KEY, OLD, OLD), ValueError, "the same key was given twice"),
    ],
)
def test_bad_keys_are_refused_without_showing_them(
    given_keys: tuple[Any, ...], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        Encryptor(*given_keys)
    assert str(caught.value) == message
    assert_nothing_shows(caught.value, given_keys)


# --- derivation ---------------------------------------------------------------------------------------------


def test_each_context_and_each_secret_gives_another_key() -> None:
    sealed = Encryptor.derive(SECRET, "stash").seal(b"data")
    assert Encryptor.derive(SECRET, "stash").open(*sealed) == b"data"
    for other in (Encryptor.derive(SECRET, "stash "), Encryptor.derive(SECRET + b".", "stash")):
        with pytest.raises(BadSeal):
            other.open(*sealed)


def test_derived_keys_rotate_too() -> None:
    old = Encryptor.derive(SECRET, "stash")
    new = Encryptor.derive(b"the secret that follows", "stash", SECRET)
    assert new.open(*old.seal(b"data")) == b"data"
    with pytest.raises(BadSeal):
        old.open(*new.seal(b"data"))


def test_any_string_is_a_context() -> None:
    for context in ("x", "sessions v1 🔑", "\ud800", "x" * 10_000):
        assert Encryptor.derive(SECRET, context).open(*Encryptor.derive(SECRET, context).seal(b"data")) == b"data"


def test_a_subclass_derives_itself() -> None:
    class Mine(Encryptor):
        pass

    assert type(Mine.derive(SECRET, "stash")) is Mine
    assert repr(Mine.derive(SECRET, "stash")) == "Mine(keys=1)"


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((b"", "stash"), ValueError, "secret must be at least 16 bytes, not 0"),
        ((b"fifteen bytes..", "stash"), ValueError, "secret must be at least 16 bytes, not 15"),
        ((SECRET, "stash", b"short"), ValueError, "older[0] must be at least 16 bytes, not 5"),
        (
            ("a password of some length", "stash"),
            TypeError,
            "secret must be at least 16 bytes, not str; decode text first",
        ),
        ((bytes(20), "stash"), ValueError, "secret is all zeros: it was never filled in"),
        ((SECRET, "stash", SECRET), ValueError, "the same secret was given twice"),
        ((SECRET, ""), ValueError, "context must not be empty: it says what the key is for"),
        ((SECRET, b"stash"), TypeError, "context must be a string, not bytes"),
        ((SECRET, None), TypeError, "context must be a string, not NoneType"),
    ],
)
def test_bad_secrets_and_contexts_are_refused_without_showing_them(
    arguments: tuple[Any, ...], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        Encryptor.derive(*arguments)
    assert str(caught.value) == message
    assert_nothing_shows(caught.value, [secret for secret in arguments if secret not in {"stash", b"stash", "", None}])


# --- what must never show -----------------------------------------------------------------------------------


def assert_nothing_shows(error: BaseException, secrets: Iterable[Any]) -> None:
    """Check that no frame of ours in the traceback of `error` has one of these in a variable, or renders it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != module.__file__:
        trace = trace.tb_next
    assert trace is not None
    rendered = "".join(traceback.TracebackException(type(error), error, trace, capture_locals=True).format())
    for secret in filter(None, secrets):
        assert repr(secret).strip("b'") not in rendered
        for frame, _ in traceback.walk_tb(trace):
            for value in frame.f_locals.values():
                assert value != secret
                assert not isinstance(value, tuple) or secret not in value
    assert error.__context__ is None


@pytest.mark.parametrize(
    "show", [repr, str, "{}".format, "%r".__mod__, lambda e: repr(vars(e)), lambda e: f"{vars(e)}"]
)
def test_an_encryptor_shows_no_key(show: Callable[[Encryptor], str]) -> None:
    shown = show(Encryptor(KEY, OLD))
    assert repr(KEY)[2:-1] not in shown
    assert repr(OLD)[2:-1] not in shown
    assert KEY.hex() not in shown


def test_repr_says_how_many_keys_there_are() -> None:
    assert repr(Encryptor(KEY, OLD, OLDER)) == "Encryptor(keys=3)"


def test_each_key_itself_is_masked() -> None:
    shows: list[Callable[[Any], str]] = [repr, str, "{}".format, "{!r}".format, "%s".__mod__, ascii, pprint.pformat]
    for key in Encryptor(KEY, OLD)._keys:
        assert [show(key) for show in shows] == ["<secret>"] * len(shows)


async def first(stream: AsyncIterator[bytes]) -> bytes:
    return await anext(stream)


def test_a_bad_seal_holds_no_key_in_the_variables_of_its_traceback() -> None:
    encryptor = Encryptor.derive(SECRET, "stash", b"another secret, older")
    secrets = [*map(bytes, encryptor._keys), SECRET]
    with pytest.raises(BadSeal) as caught:
        encryptor.open(b"n" * 24, b"c" * 40)
    assert_nothing_shows(caught.value, secrets)
    with pytest.raises(BadSeal) as caught:
        run(lambda: first(encryptor.open_stream([b"s" * 100])))
    assert_nothing_shows(caught.value, secrets)


def test_an_encryptor_is_not_pickled_or_copied() -> None:
    encryptor = Encryptor(KEY)
    attempts: list[Callable[[Any], object]] = [copy.copy, copy.deepcopy, pickle.dumps, lambda e: pickle.dumps([e], 0)]
    for attempt in attempts:
        with pytest.raises(TypeError, match="holds keys and cannot be pickled or copied: make a new one"):
            attempt(encryptor)


def test_what_was_sealed_pickles_and_reads_well() -> None:
    sealed = Encryptor(KEY).seal(b"data")
    assert pickle.loads(pickle.dumps(sealed)) == sealed
    assert sealed == (sealed.nonce, sealed.ciphertext)
    assert repr(Sealed(b"n", b"c")) == "Sealed(nonce=b'n', ciphertext=b'c')"


# --- large messages -----------------------------------------------------------------------------------------

LARGE = bytes(range(256)) * 1024  # 256 KiB, the least that takes a thread


@pytest.mark.parametrize("size", [module._LARGE - 1, module._LARGE, module._LARGE + 16, module._LARGE + 17])
def test_large_messages_are_sealed_the_same_with_what_is_public_of_pynacl(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nonce, data = b"n" * 24, bytes(size)
    sealed = module._encrypt(data, b"aad", nonce, KEY)
    altered = sealed[:-1] + bytes([sealed[-1] ^ 1])
    opened = module._decrypt(sealed, b"aad", nonce, (OLD, KEY))
    assert module._decrypt(altered, b"aad", nonce, (OLD, KEY)) is None
    monkeypatch.setattr(module, "_libsodium", None)  # as if PyNaCl had nothing else to offer
    assert module._encrypt(data, b"aad", nonce, KEY) == sealed
    assert module._decrypt(sealed, b"aad", nonce, (OLD, KEY)) == opened == data
    assert module._decrypt(altered, b"aad", nonce, (OLD, KEY)) is None


def test_small_messages_take_no_thread_and_do_not_suspend() -> None:
    encryptor = Encryptor(KEY)
    with pytest.raises(StopIteration) as stop:
        encryptor.seal_large(LARGE[:-1], b"aad").send(None)
    sealed: Sealed = stop.value.value
    with pytest.raises(StopIteration) as stop:
        encryptor.open_large(*sealed, b"aad").send(None)
    assert stop.value.value == LARGE[:-1]


class Gate(ThreadPoolExecutor):
    """An executor that counts what it is given, and starts it when told."""

    def __init__(self) -> None:
        super().__init__(max_workers=2)
        self.opened = threading.Event()
        self.submitted = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.submitted += 1

        def gated() -> Any:
            self.opened.wait()
            return fn(*args, **kwargs)

        return super().submit(gated)


@contextlib.contextmanager
def gated() -> Iterator[Gate]:
    gate = Gate()
    asyncio.get_running_loop().set_default_executor(gate)
    try:
        yield gate
    finally:
        gate.opened.set()  # the loop waits for its threads when it is closed


@pytest.mark.real_time
async def test_large_messages_are_sealed_and_opened_in_a_thread_while_the_loop_goes_on() -> None:
    encryptor = Encryptor(KEY)
    with gated() as gate:
        sealing = asyncio.create_task(encryptor.seal_large(bytearray(LARGE), b"aad"))
        await asyncio.sleep(0)
        assert not sealing.done()
        gate.opened.set()
        sealed = await sealing
        assert await encryptor.open_large(*sealed, b"aad") == LARGE
        assert gate.submitted == 2
        with pytest.raises(BadSeal) as caught:
            await encryptor.open_large(*sealed, b"other")
        assert caught.value.__context__ is None


@pytest.mark.real_time
async def test_a_cancelled_large_seal_returns_at_once_and_its_thread_ends_by_itself() -> None:
    encryptor = Encryptor(KEY)
    with gated() as gate:
        tasks = [
            asyncio.create_task(encryptor.seal_large(LARGE)),
            asyncio.create_task(encryptor.open_large(b"n" * 24, LARGE * 2)),  # which fails, and nobody hears of it
        ]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        for task in tasks:
            with pytest.raises(asyncio.CancelledError):
                await task
        assert gate.submitted == 2
        gate.opened.set()
        assert encryptor.open(*await encryptor.seal_large(LARGE)) == LARGE


def test_a_large_seal_cancelled_at_any_await_leaves_nothing_behind() -> None:
    encryptor = Encryptor(KEY)
    sealed = encryptor.seal(LARGE)
    for point in cancellation_points():

        async def main(point: Any = point) -> None:
            if not await point.cancel(encryptor.seal_large(LARGE)):
                assert encryptor.open(*point.result) == LARGE

        asyncio.run(main())
    for point in cancellation_points():

        async def again(point: Any = point) -> None:
            if not await point.cancel(encryptor.open_large(*sealed)):
                assert point.result == LARGE

        asyncio.run(again())


def test_on_virtual_time_which_has_no_threads_a_large_message_is_worked_on_in_place() -> None:
    encryptor = Encryptor(KEY)
    sealed = run(lambda: encryptor.seal_large(LARGE, b"aad"))
    assert run(lambda: encryptor.open_large(*sealed, b"aad")) == LARGE
    with pytest.raises(BadSeal) as caught:
        run(lambda: encryptor.open_large(*sealed, b"other"))
    assert caught.value.__context__ is None
    with pytest.raises(TypeError, match="aad must be bytes") as wrong:
        run(lambda: encryptor.seal_large(LARGE, "aad"))  # type: ignore[arg-type]
    assert wrong.value.__context__ is None


@pytest.mark.real_time
async def test_a_loop_that_is_shutting_down_still_seals_large_messages() -> None:
    await asyncio.get_running_loop().shutdown_default_executor()
    assert Encryptor(KEY).open(*await Encryptor(KEY).seal_large(LARGE)) == LARGE


def test_one_encryptor_serves_many_threads_at_once() -> None:
    encryptor = Encryptor(KEY, OLD)

    def work(number: int) -> bool:
        data = bytes([number % 251]) * (number % 7 * 50_000)
        return all(encryptor.open(*encryptor.seal(data, b"aad"), b"aad") == data for _ in range(5))

    with ThreadPoolExecutor(max_workers=8) as pool:
        assert all(pool.map(work, range(100)))


def test_it_needs_no_loop_and_serves_one_loop_after_the_other() -> None:
    encryptor = Encryptor(KEY)
    sealed = asyncio.run(encryptor.seal_large(LARGE))
    assert asyncio.run(encryptor.open_large(*sealed)) == LARGE
