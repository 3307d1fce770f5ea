"""Encryptor: seals bytes, so that nobody without the key can read them, or change them unnoticed.

The cipher is libsodium's XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha-03), through PyNaCl.

>>> encryptor = Encryptor(Encryptor.generate_key())
>>> sealed = encryptor.seal(b"the map", aad=b"for bob")
>>> encryptor.open(*sealed, aad=b"for bob")
b'the map'
>>> encryptor.open(*sealed, aad=b"for eve")
Traceback (most recent call last):
    ...
meshkit.errors.BadSeal: The sealed bytes could not be opened.

Keys do not show: they are masked in `repr`, in logs and in tracebacks that render variables, and errors are raised from
frames that hold none.
"""

import asyncio
import hmac
import io
import sys
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn, Self, TypeVar

from nacl import bindings as sodium
from nacl.bindings import crypto_aead
from nacl.exceptions import CryptoError

from meshkit._chunks import BytesLike, Chunks, Source, as_bytes, converted, size_of
from meshkit._entropy import Secret, random_bytes
from meshkit.errors import BadSeal

__all__ = ["Encryptor", "Sealed"]

_KEY, _NONCE, _TAG = 32, 24, 16  # bytes: of a key, of a nonce, and by which a ciphertext is longer than its plaintext
_LEAST_SECRET = 16  # bytes
_LARGE = 256 * 1024  # bytes; sealing them takes about as long as having a thread do it costs, 0.2 ms

_T = TypeVar("_T")


class Sealed(NamedTuple):
    """What `Encryptor.seal` returns. Neither part is secret, and it takes both to open: `open(*sealed)`."""

    nonce: bytes
    ciphertext: bytes


# --- keys ---------------------------------------------------------------------------------------------------


def _refusal(name: str, values: tuple[Any, ...], lengths: range, context: Any) -> TypeError | ValueError | None:
    """Return what is wrong with these keys or secrets, without showing any."""
    wanted = f"{'exactly' if len(lengths) == 1 else 'at least'} {lengths.start} bytes"
    for number, value in enumerate(values):
        which = f"older[{number - 1}]" if number else name
        if not isinstance(value, bytes):
            return TypeError(f"{which} must be {wanted}, not {type(value).__name__}; decode text first")
        if len(value) not in lengths:
            return ValueError(f"{which} must be {wanted}, not {len(value)}")
        if not any(value):
            return ValueError(f"{which} is all zeros: it was never filled in")
    if len(set(values)) < len(values):
        return ValueError(f"the same {name} was given twice")
    if not isinstance(context, str):
        return TypeError(f"context must be a string, not {type(context).__name__}")
    return None if context else ValueError("context must not be empty: it says what the key is for")


def _hkdf(secret: bytes, info: bytes, salt: bytes = b"") -> bytes:
    """Return the first block, which is the length of a key, of HKDF with SHA-256 (RFC 5869): extract, then expand."""
    return hmac.digest(hmac.digest(salt, secret, "sha256"), info + b"\x01", "sha256")


# --- one message --------------------------------------------------------------------------------------------
# PyNaCl clears its buffer first and copies it at the end, both under the GIL: a thread that seals 64 MiB stops the loop
# for 50 ms or more. So libsodium writes large messages into the result itself, without the GIL, in half the time. What
# PyNaCl calls it with is not public: should that go away, PyNaCl's public functions serve all sizes.
_libsodium: Any = getattr(crypto_aead, "lib", None)
_ffi: Any = getattr(crypto_aead, "ffi", None)


def _encrypt(message: bytes, aad: bytes, nonce: bytes, key: bytes) -> bytes:
    if len(message) < _LARGE or _libsodium is None:
        return sodium.crypto_aead_xchacha20poly1305_ietf_encrypt(message, aad, nonce, key)
    result = io.BytesIO(bytes(len(message) + _TAG))  # whose getvalue() is this buffer, not a copy of it
    with result.getbuffer() as buffer:
        _libsodium.crypto_aead_xchacha20poly1305_ietf_encrypt(
            _ffi.from_buffer(buffer), _ffi.NULL, message, len(message), aad, len(aad), _ffi.NULL, nonce, key
        )
    return result.getvalue()


def _decrypt(ciphertext: bytes, aad: bytes, nonce: bytes, keys: tuple[bytes, ...]) -> bytes | None:
    """Return the plaintext, or None if no key opens it."""
    size = len(ciphertext) - _TAG
    for key in keys if len(nonce) == _NONCE and size >= 0 else ():
        if size < _LARGE or _libsodium is None:
            try:
                return sodium.crypto_aead_xchacha20poly1305_ietf_decrypt(ciphertext, aad, nonce, key)
            except CryptoError:
                continue
        result = io.BytesIO(bytes(size))
        with result.getbuffer() as buffer:
            failed: int = _libsodium.crypto_aead_xchacha20poly1305_ietf_decrypt(
                _ffi.from_buffer(buffer), _ffi.NULL, _ffi.NULL, ciphertext, len(ciphertext), aad, len(aad), nonce, key
            )
        if not failed:
            return result.getvalue()
    return None


async def _in_thread(work: Callable[[], _T]) -> _T:
    try:
        result = asyncio.get_running_loop().run_in_executor(None, work)
    except RuntimeError:  # the loop has no threads to give: it runs on virtual time, or has begun to shut down
        result = None
    return work() if result is None else await result


# --- a stream of messages -----------------------------------------------------------------------------------

_CHUNK, _CHUNK_TAG, _HEADER = 64 * 1024, 17, 24  # bytes: of plaintext, by which a chunk is longer, of the header
_FINAL = sodium.crypto_secretstream_xchacha20poly1305_TAG_FINAL


class _SealStream(Chunks):
    def __init__(self, key: bytes, aad: bytes) -> None:
        super().__init__(_CHUNK, _CHUNK)
        self._aad = aad
        self._state = sodium.crypto_secretstream_xchacha20poly1305_state()
        self._header = sodium.crypto_secretstream_xchacha20poly1305_init_push(self._state, key)

    def convert(self, chunk: bytes, *, last: bool) -> bytes:
        header, self._header = self._header, b""
        tag = _FINAL if last else sodium.crypto_secretstream_xchacha20poly1305_TAG_MESSAGE
        return header + sodium.crypto_secretstream_xchacha20poly1305_push(self._state, chunk, self._aad, tag)


class _OpenStream(Chunks):
    def __init__(self, keys: tuple[bytes, ...], aad: bytes) -> None:
        super().__init__(_HEADER + _CHUNK + _CHUNK_TAG, _CHUNK + _CHUNK_TAG)
        self._keys, self._aad = keys, aad
        self._states: list[sodium.crypto_secretstream_xchacha20poly1305_state] = []

    def convert(self, chunk: bytes, *, last: bool) -> bytes:
        if not self._states:  # this is the first chunk: the header stands before it, and any key may be the right one
            self._begin(chunk[:_HEADER])
            chunk = chunk[_HEADER:]
        for state in self._states:
            try:
                plaintext, tag = sodium.crypto_secretstream_xchacha20poly1305_pull(state, chunk, self._aad)
            except CryptoError:
                continue
            if (tag == _FINAL) is last:
                self._states = [state]
                return plaintext
        raise BadSeal

    def _begin(self, header: bytes) -> None:
        for key in self._keys if len(header) == _HEADER else ():
            state = sodium.crypto_secretstream_xchacha20poly1305_state()
            sodium.crypto_secretstream_xchacha20poly1305_init_pull(state, header, key)
            self._states.append(state)


# --- the utility --------------------------------------------------------------------------------------------


class Encryptor:
    """Seals bytes with a key of 32 bytes, and opens what was sealed with it or with one of the `older` keys.

    To replace a key, put the new one first: `Encryptor(new, old)` seals with `new` and opens with either.

    An Encryptor never changes: any task and any thread may use it at any time. `aad`, associated data, is not stored,
    but what was sealed with it opens only with the same again: say there what the bytes are for, so that nobody can put
    them elsewhere. Whatever cannot be opened, for whatever reason, raises the same `BadSeal`.

    Cost: a few µs for 256 bytes, about a millisecond for 1 MiB; opening tries one key after the other.

    Raises:
        TypeError: A key is not `bytes`.
        ValueError: A key is not 32 bytes long, or all zeros, or given twice.
    """

    def __init__(self, key: bytes, *older: bytes) -> None:
        keys = (key, *older)
        refusal = _refusal("key", keys, range(_KEY, _KEY + 1), "given")
        self._keys: tuple[bytes, ...] = () if refusal else tuple(map(Secret, keys))
        del key, older, keys  # a traceback that renders variables must not show these
        if refusal is not None:
            raise refusal

    @classmethod
    def derive(cls, secret: bytes, context: str, *older: bytes) -> Self:
        """Make one from a secret of at least 16 bytes. Each `context` ("sessions", "stash v1") gives another key.

        `older` are the secrets that `secret` replaces. The key is HKDF-SHA256 (RFC 5869) of the secret, with no salt
        and the UTF-8 of `context` as info. Not for passwords: they need a slow function (`nacl.pwhash.argon2id`).

        Raises:
            TypeError: A secret is not `bytes`, or `context` is not a string.
            ValueError: A secret is shorter than 16 bytes, all zeros, or given twice; or `context` is empty.
        """
        secrets = (secret, *older)
        refusal = _refusal("secret", secrets, range(_LEAST_SECRET, sys.maxsize), context)
        keys = (
            () if refusal else tuple(Secret(_hkdf(each, context.encode("utf-8", "surrogatepass"))) for each in secrets)
        )
        del secret, older, secrets
        if refusal is not None:
            raise refusal
        return cls(*keys)

    @staticmethod
    def generate_key() -> bytes:
        """Return a new random key, to be kept where you keep secrets."""
        return random_bytes(_KEY)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(keys={len(self._keys)})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("an Encryptor holds keys and cannot be pickled or copied: make a new one where it is needed")

    def seal(self, plaintext: BytesLike, aad: BytesLike = b"") -> Sealed:
        """Seal `plaintext` under a fresh random nonce.

        Raises:
            TypeError: `plaintext` or `aad` is not like bytes.
        """
        nonce = random_bytes(_NONCE)
        plaintext, aad = as_bytes(plaintext, "plaintext"), as_bytes(aad, "aad")
        return Sealed(nonce, _encrypt(plaintext, aad, nonce, self._keys[0]))

    def open(self, nonce: BytesLike, ciphertext: BytesLike, aad: BytesLike = b"") -> bytes:
        """Return what was sealed: `open(*sealed)`, `open(*sealed, aad)`.

        Raises:
            BadSeal: It was not sealed with one of the keys and this `aad`, or it was changed since.
        """
        plaintext = _decrypt(as_bytes(ciphertext), as_bytes(aad), as_bytes(nonce), self._keys)
        if plaintext is None:
            raise BadSeal
        return plaintext

    def seal_combined(self, plaintext: BytesLike, aad: BytesLike = b"") -> bytes:
        """Seal into one piece: the 24 bytes of the nonce, then the ciphertext."""
        return b"".join(self.seal(plaintext, aad))

    def open_combined(self, combined: BytesLike, aad: BytesLike = b"") -> bytes:
        """Return what `seal_combined` sealed, or raise `BadSeal` as `open` does."""
        combined = as_bytes(combined)
        return self.open(combined[:_NONCE], combined[_NONCE:], aad)

    async def seal_large(self, plaintext: BytesLike, aad: BytesLike = b"") -> Sealed:
        """Seal without holding up the loop: from 256 KiB in a thread, anything smaller here and now.

        Cancelled, it returns at once; the thread, one of the loop's default executor, goes on until it is done. A loop
        that has no threads, as on virtual time, does it here and now whatever the size.
        """
        if size_of(plaintext) < _LARGE:
            return self.seal(plaintext, aad)
        return await _in_thread(partial(self.seal, plaintext, aad))

    async def open_large(self, nonce: BytesLike, ciphertext: BytesLike, aad: BytesLike = b"") -> bytes:
        """Open without holding up the loop, like `seal_large`, or raise `BadSeal` as `open` does."""
        if size_of(ciphertext) < _LARGE + _TAG:
            return self.open(nonce, ciphertext, aad)
        return await _in_thread(partial(self.open, nonce, ciphertext, aad))

    def seal_stream(self, chunks: Source, aad: BytesLike = b"") -> AsyncGenerator[bytes, None]:
        """Seal data that is larger than memory: async iterate over it, and write each piece.

        `chunks` is an iterable, plain or async, of bytes of any sizes. A generator is closed with the stream; a file or
        a connection stays open. In memory are one item of it and two chunks; the loop gets a turn after every MiB.

        The format is libsodium's secretstream: a header of 24 bytes, then a message (17 bytes longer) for each 64 KiB
        of the data, then one, tagged FINAL, for the last 64 KiB or less; `aad` goes with each.

        Raises:
            TypeError: `chunks` is not an iterable of bytes, or `aad` is not like bytes.
        """
        return converted(_SealStream(self._keys[0], as_bytes(aad, "aad")), chunks, "a chunk")

    def open_stream(self, chunks: Source, aad: BytesLike = b"") -> AsyncGenerator[bytes, None]:
        """Open what `seal_stream` sealed, which may be cut into `chunks` anywhere; the rest is as there.

        Each piece that it yields is authentic and in its place; that it was all, only the end of the iteration says.

        Raises:
            BadSeal: It was not sealed with one of the keys and this `aad`, or it was changed since: some of it is
                altered, moved, repeated, missing, or added.
        """
        return converted(_OpenStream(self._keys, as_bytes(aad)), chunks)
