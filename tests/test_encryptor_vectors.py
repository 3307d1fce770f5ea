"""The Encryptor against what others made: published test vectors, and what other implementations sealed."""

import hashlib
import json
import os
import pathlib
from typing import NamedTuple

import pytest
from nacl import bindings as sodium

from meshkit import encryptor as module
from meshkit.encryptor import Encryptor
from meshkit.errors import BadSeal
from meshkit.testing import run

CHUNK = 64 * 1024


def unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", "").replace("\n", ""))


class Vector(NamedTuple):
    number: int
    key: bytes
    nonce: bytes
    aad: bytes
    message: bytes
    sealed: bytes
    valid: bool


# draft-irtf-cfrg-xchacha-03, appendix A.3.1
IETF = Vector(
    number=0,
    key=unhex("808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f"),
    nonce=unhex("404142434445464748494a4b4c4d4e4f5051525354555657"),
    aad=unhex("50515253c0c1c2c3c4c5c6c7"),
    message=b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
    b"sunscreen would be it.",
    sealed=unhex(
        "bd6d179d3e83d43b9576579493c0e939572a1700252bfaccbed2902c21396cbb"
        "731c7f1b0b4aa6440bf3a82f4eda7e39ae64c6708c54c216cb96b72e1213b452"
        "2f8c9ba40db5d945b11b69b982c1bb9e3f3fac2bc369488f76b2383565d3fff9"
        "21f9664c97637da9768812f615c68b13b52e"
        "c0875924c1c7987947deafd8780acf49"
    ),
    valid=True,
)


def wycheproof() -> list[Vector]:
    """Return the vectors of C2SP/wycheproof from $MESHKIT_VECTORS, or from ../shared/vectors beside the checkout."""
    beside = pathlib.Path(__file__).parent.parent.parent / "shared" / "vectors"
    path = pathlib.Path(os.environ.get("MESHKIT_VECTORS", beside)) / "wycheproof_xchacha20_poly1305.json"
    if not path.exists():
        pytest.skip("the Wycheproof vectors are not here; set MESHKIT_VECTORS to the folder that holds them")
    found = []
    for number, key, nonce, aad, message, ciphertext, tag, valid in json.loads(path.read_text("ascii"))["vectors"]:
        sealed = unhex(ciphertext + tag)
        found.append(Vector(number, unhex(key), unhex(nonce), unhex(aad), unhex(message), sealed, valid))
    return found


def check(vector: Vector, monkeypatch: pytest.MonkeyPatch) -> None:
    encryptor = Encryptor(vector.key)
    if vector.valid:
        assert encryptor.open(vector.nonce, vector.sealed, vector.aad) == vector.message, vector.number
        assert encryptor.open_combined(vector.nonce + vector.sealed, vector.aad) == vector.message, vector.number
        monkeypatch.setattr(os, "urandom", lambda _: vector.nonce)
        assert encryptor.seal(vector.message, vector.aad) == (vector.nonce, vector.sealed), vector.number
    else:
        with pytest.raises(BadSeal):
            encryptor.open(vector.nonce, vector.sealed, vector.aad)


def test_the_vector_of_the_ietf_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    check(IETF, monkeypatch)


def test_the_vectors_of_wycheproof(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = wycheproof()
    for vector in vectors:
        check(vector, monkeypatch)
    assert sum(vector.valid for vector in vectors) > len(vectors) / 2
    print(f"{len(vectors)} vectors")


# RFC 5869, appendix A, SHA-256. An Encryptor needs the first block of 32 bytes only, which is the same at any length.
HKDF = [
    (
        "0b" * 22,
        "000102030405060708090a0b0c",
        "f0f1f2f3f4f5f6f7f8f9",
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf",
    ),
    (
        bytes(range(0x50)).hex(),
        bytes(range(0x60, 0xB0)).hex(),
        bytes(range(0xB0, 0x100)).hex(),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c",
    ),
    ("0b" * 22, "", "", "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"),
]


@pytest.mark.parametrize(("secret", "salt", "info", "output"), HKDF)
def test_the_vectors_of_rfc_5869(secret: str, salt: str, info: str, output: str) -> None:
    assert module._hkdf(unhex(secret), unhex(info), unhex(salt)) == unhex(output)


def test_a_derived_key_is_hkdf_without_salt_and_with_the_context_as_info() -> None:
    key = module._hkdf(b"a secret of some length", "stash v1 🔑".encode())
    sealed = Encryptor(key).seal(b"data")
    assert Encryptor.derive(b"a secret of some length", "stash v1 🔑").open(*sealed) == b"data"


# Made with pysodium 0.7.19 on libsodium 1.0.18 (crypto_aead_xchacha20poly1305_ietf_encrypt), and byte for byte the same
# with pycryptodome (ChaCha20_Poly1305 with a nonce of 24 bytes), which is an implementation of its own.
OTHER_KEY = bytes(range(100, 132))
OTHER_NONCE = bytes(range(24))
OTHER_SEALED = unhex("b4b1a41d880a74a47ca09dfd5add22d7a53f3df74a8ff19d4baf34fc8eacec44a121437900cf7573cc78c36b8240e6")
OTHER_EMPTY = unhex("7291d902b4e19bc55ba27aa7772c3972")


def test_it_opens_what_another_binding_and_another_implementation_sealed() -> None:
    encryptor = Encryptor(OTHER_KEY)
    assert encryptor.open(OTHER_NONCE, OTHER_SEALED, b"for bob") == b"meet me at the old mill at noon"
    assert encryptor.open_combined(OTHER_NONCE + OTHER_SEALED, b"for bob") == b"meet me at the old mill at noon"
    assert encryptor.open(OTHER_NONCE, OTHER_EMPTY) == b""


# Made with pysodium 0.7.19 on libsodium 1.0.18: crypto_secretstream_xchacha20poly1305_init_push, then _push for chunks
# of these sizes, with b"for bob" as additional data of each, and tag FINAL on the last.
class Stream(NamedTuple):
    sizes: list[int]
    header: bytes
    sha256: str


STREAMS = [
    Stream(
        [CHUNK, CHUNK, 100],
        unhex("ccc375cb6266d3f5833ffc20d7b8c69ede4d14cc11723eef"),
        "ff4d13863d1063fabc29a1a8180f25cc297eee8f2d17d1addf6506ed9bc0c5d4",
    ),
    Stream(
        [CHUNK, CHUNK],
        unhex("19209840a7f62057210b93dd797d433e97007ffdd995d3af"),
        "5b81d67c14e695a201249162e691a72a4f5ca878016fddfcd37c33aa87330096",
    ),
    Stream(  # as programs write it that learn only afterwards that a chunk was the last
        [CHUNK, CHUNK, 0],
        unhex("9fb3d8d2060b1e2c5a6743530ff1f49cb5d0e1b097b9399d"),
        "1333f2b0b1bf8d2cf964515cd12c09f67065216234163a0a01e820e9db6cefdd",
    ),
]
SHORT_STREAM = unhex(
    "2b6b04d05abf89b629dedab0219c5f1e55c10441cfe6ea4b3639f49c319dda24351cf6591f5e7dad"
    "bd723adb566a682923b2cbdb07cb4c837b7b82036172e760bd8d0f10dc3615cf"
)
EMPTY_STREAM = unhex("7c2954122df290a7d2c147ffb0eb3766ff02517df22ed497c4d40b7485ce5ad7c828cef3f27a82fed7")


def plaintext(size: int) -> bytes:
    return bytes(i * i % 251 for i in range(size))


def opened(sealed: bytes, aad: bytes = b"for bob") -> bytes:
    async def main() -> bytes:
        return b"".join([piece async for piece in Encryptor(OTHER_KEY).open_stream([sealed], aad)])

    return run(main)


def rebuilt(stream: Stream) -> bytes:
    """Return the stream that the other binding made. It is too long to stand here, but its header determines it."""
    state = sodium.crypto_secretstream_xchacha20poly1305_state()
    sodium.crypto_secretstream_xchacha20poly1305_init_pull(state, stream.header, OTHER_KEY)
    data, output, start = plaintext(sum(stream.sizes)), [stream.header], 0
    for number, size in enumerate(stream.sizes, 1):
        tag = sodium.crypto_secretstream_xchacha20poly1305_TAG_FINAL if number == len(stream.sizes) else 0
        chunk = data[start : start + size]
        output.append(sodium.crypto_secretstream_xchacha20poly1305_push(state, chunk, b"for bob", tag))
        start += size
    return b"".join(output)


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: str(stream.sizes))
def test_it_opens_streams_that_another_binding_sealed(stream: Stream) -> None:
    sealed = rebuilt(stream)
    assert hashlib.sha256(sealed).hexdigest() == stream.sha256
    assert opened(sealed) == plaintext(sum(stream.sizes))


def test_it_opens_short_and_empty_streams_that_another_binding_sealed() -> None:
    assert opened(SHORT_STREAM) == plaintext(31)
    assert opened(EMPTY_STREAM, b"") == b""


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_bare_libsodium_opens_a_stream_as_the_format_is_documented(size: int) -> None:
    async def main() -> bytes:
        return b"".join([piece async for piece in Encryptor(OTHER_KEY).seal_stream([plaintext(size)], b"for bob")])

    sealed = run(main)
    state = sodium.crypto_secretstream_xchacha20poly1305_state()
    sodium.crypto_secretstream_xchacha20poly1305_init_pull(state, sealed[:24], OTHER_KEY)
    messages = [sealed[start : start + CHUNK + 17] for start in range(24, len(sealed), CHUNK + 17)]
    pulled = [sodium.crypto_secretstream_xchacha20poly1305_pull(state, each, b"for bob") for each in messages]
    assert b"".join(data for data, _ in pulled) == plaintext(size)
    assert [tag for _, tag in pulled] == [0] * (len(pulled) - 1) + [3]
    assert all(len(data) == CHUNK for data, _ in pulled[:-1])
