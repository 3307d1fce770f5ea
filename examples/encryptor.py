"""Seal a message, replace the key, and seal a stream; what was changed on its way does not open."""

import asyncio
from collections.abc import AsyncIterator

from meshkit import BadSeal, Encryptor

SECRET, NEW_SECRET = b"kept where secrets are kept", b"the one that follows it"


async def upload(pieces: int) -> AsyncIterator[bytes]:
    for number in range(pieces):
        await asyncio.sleep(0.001)
        yield bytes([number]) * 100_000


async def main() -> None:
    old = Encryptor.derive(SECRET, "stash v1")
    sealed = old.seal(b"the map", aad=b"for bob")
    print("bob reads:", old.open(*sealed, aad=b"for bob"))
    try:
        old.open(*sealed, aad=b"for eve")
    except BadSeal as error:
        print("eve reads:", error)

    rotated = Encryptor.derive(NEW_SECRET, "stash v1", SECRET)
    print("with a new key:", rotated.open(*sealed, aad=b"for bob"))

    stream = [piece async for piece in rotated.seal_stream(upload(5), aad=b"backup")]
    sizes = [len(piece) async for piece in rotated.open_stream(stream, aad=b"backup")]
    print(f"stream: {sum(sizes):,} bytes in {len(sizes)} pieces")
    try:
        print([len(piece) async for piece in rotated.open_stream(stream[:-1], aad=b"backup")])
    except BadSeal as error:
        print("without its end:", error)


if __name__ == "__main__":
    asyncio.run(main())
