"""The Encryptor, beside what PyNaCl does for the same bytes."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable

from nacl import bindings as sodium

from meshkit.encryptor import Encryptor
from tests.bench.harness import Compare, Fact, Measure

KEY = os.urandom(32)
ENCRYPTOR = Encryptor(KEY)
ROTATED = Encryptor(os.urandom(32), os.urandom(32), KEY)
MESSAGE, AAD = os.urandom(256), b"for bob"
NONCE, CIPHERTEXT = ENCRYPTOR.seal(MESSAGE, AAD)
CHUNK = 64 * 1024
MIB = os.urandom(1024 * 1024)

encrypt = sodium.crypto_aead_xchacha20poly1305_ietf_encrypt
decrypt = sodium.crypto_aead_xchacha20poly1305_ietf_decrypt
push = sodium.crypto_secretstream_xchacha20poly1305_push
pull = sodium.crypto_secretstream_xchacha20poly1305_pull


def bare_seal(n: int) -> None:
    for _ in range(n):
        nonce = os.urandom(24)
        encrypt(MESSAGE, AAD, nonce, KEY)


def our_seal(n: int) -> None:
    seal = ENCRYPTOR.seal
    for _ in range(n):
        seal(MESSAGE, AAD)


def bare_open(n: int) -> None:
    for _ in range(n):
        decrypt(CIPHERTEXT, AAD, NONCE, KEY)


def our_open(n: int) -> None:
    open_ = ENCRYPTOR.open
    for _ in range(n):
        open_(NONCE, CIPHERTEXT, AAD)


def third_key(n: int) -> None:
    open_ = ROTATED.open
    for _ in range(n):
        open_(NONCE, CIPHERTEXT, AAD)


def bare_mib(n: int) -> None:
    for _ in range(n):
        encrypt(MIB, AAD, os.urandom(24), KEY)


def our_mib(n: int) -> None:
    for _ in range(n):
        ENCRYPTOR.seal(MIB, AAD)


def bare_seal_stream(n: int) -> None:
    for _ in range(n):
        state = sodium.crypto_secretstream_xchacha20poly1305_state()
        sodium.crypto_secretstream_xchacha20poly1305_init_push(state, KEY)
        for start in range(0, len(MIB), CHUNK):
            push(state, MIB[start : start + CHUNK], AAD, 3 if start + CHUNK == len(MIB) else 0)


async def our_seal_stream(n: int) -> None:
    for _ in range(n):
        async for _ in ENCRYPTOR.seal_stream([MIB], AAD):
            pass


def _bare_sealed() -> tuple[bytes, list[bytes]]:
    state = sodium.crypto_secretstream_xchacha20poly1305_state()
    header = sodium.crypto_secretstream_xchacha20poly1305_init_push(state, KEY)
    starts = range(0, len(MIB), CHUNK)
    return header, [push(state, MIB[start : start + CHUNK], AAD, 3 if start == starts[-1] else 0) for start in starts]


HEADER, SEALED = _bare_sealed()
STREAM = HEADER + b"".join(SEALED)


def bare_open_stream(n: int) -> None:
    for _ in range(n):
        state = sodium.crypto_secretstream_xchacha20poly1305_state()
        sodium.crypto_secretstream_xchacha20poly1305_init_pull(state, HEADER, KEY)
        for start in range(24, len(STREAM), CHUNK + 17):
            pull(state, STREAM[start : start + CHUNK + 17], AAD)


async def our_open_stream(n: int) -> None:
    for _ in range(n):
        async for _ in ENCRYPTOR.open_stream([STREAM], AAD):
            pass


def longest_pause(work: Callable[[bytes], Awaitable[object]]) -> Callable[[int], float]:
    """Return a function that measures for how many milliseconds the loop stands still while `n` MiB are worked on."""

    async def main(n: int) -> float:
        worst, last, done = 0.0, time.perf_counter(), False

        async def watch() -> None:
            nonlocal worst, last
            while not done:
                await asyncio.sleep(0)
                now = time.perf_counter()
                worst, last = max(worst, now - last), now

        data = MIB * n
        watching = asyncio.create_task(watch())
        await asyncio.sleep(0.01)
        worst = 0.0
        await work(data)
        done = True
        await watching
        return worst * 1000

    return lambda n: asyncio.run(main(n))


async def in_a_bare_thread(data: bytes) -> None:
    await asyncio.to_thread(encrypt, data, AAD, NONCE, KEY)


async def by_the_stream(data: bytes) -> None:
    async for _ in ENCRYPTOR.seal_stream([data], AAD):
        pass


def measures() -> list[Measure]:
    return [
        Compare("seal of 256 B / PyNaCl with a nonce", bare_seal, our_seal, 20_000),
        Compare("open of 256 B / PyNaCl", bare_open, our_open, 20_000),
        Compare("open of 256 B, third of 3 keys / PyNaCl, one key", bare_open, third_key, 10_000),
        Compare("seal of 1 MiB / PyNaCl", bare_mib, our_mib, 50),
        Compare("seal_stream of 1 MiB / PyNaCl, chunk by chunk", bare_seal_stream, our_seal_stream, 50),
        Compare("open_stream of 1 MiB / PyNaCl, chunk by chunk", bare_open_stream, our_open_stream, 50),
        Fact("longest pause of the loop, MiB in a thread: PyNaCl", longest_pause(in_a_bare_thread), 64, "ms"),
        Fact("longest pause of the loop, MiB by seal_large", longest_pause(ENCRYPTOR.seal_large), 64, "ms"),
        Fact("longest pause of the loop, MiB by seal_stream", longest_pause(by_the_stream), 64, "ms"),
    ]
