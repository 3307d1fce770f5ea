"""Identity: who a node is, as an Ed25519 key pair (RFC 8032). Its public key, as text, is its node id.

So nothing has to be looked up to verify what a node signed, and no two nodes can have one id.

>>> alice, bob = Identity.from_seed(b"a" * 32), Identity.from_seed(b"b" * 32)
>>> alice.node_id
'v4dkhyzjc4koj42wygojwfondfi6y3tgmkvhppqhkr7sre4dgqoq'
>>> verify(public_key_of(alice.node_id), alice.sign(b"I was here"), b"I was here")
True
>>> sealed = alice.shared_with(bob.node_id, "notes").seal(b"the map")
>>> bob.shared_with(alice.node_id, "notes").open(*sealed)
b'the map'

The secret key does not show: it is masked in `repr`, in logs and in tracebacks that render variables.
"""

import base64
import errno
import os
import stat
import tempfile
from pathlib import Path
from typing import Any, NoReturn, Self

from nacl import bindings as sodium
from nacl.exceptions import BadSignatureError

from meshkit._entropy import Secret, random_bytes
from meshkit.encryptor import Encryptor

__all__ = ["SIGNATURE_SIZE", "Identity", "node_id_of", "public_key_of", "verify"]

SIGNATURE_SIZE = 64
"""The bytes of a signature."""
_KEY_SIZE = 32  # bytes, of a public key and of the seed of a secret one
_ID_SIZE = 52  # characters of base32 for them; the last one has four bits to spare, which are zero


# --- ids ----------------------------------------------------------------------------------------------------


def node_id_of(public_key: bytes) -> str:
    """Return the node id of a public key: its base32 (RFC 4648), in lower case, without padding."""
    return base64.b32encode(public_key).decode().rstrip("=").lower()


def public_key_of(node_id: str) -> bytes:
    """Return the public key that `node_id` is the text of.

    Cost: about 100 µs, nearly all of it to make sure that it is a key.

    Raises:
        ValueError: It is not a node id. Any other text of the same key is none; nor is that of a key which libsodium
            rejects: not canonical, off the curve, of small order, or with a part of small order.
    """
    key = _decoded(node_id)
    if key is None or not sodium.crypto_core_ed25519_is_valid_point(key):
        shown = repr(node_id) if len(repr(node_id)) <= 80 else f"{node_id!r:.80}..."
        raise ValueError(f"{shown} is not a node id, which is a public key as {_ID_SIZE} characters of base32")
    return key


def _decoded(text: Any) -> bytes | None:
    """Return the 32 bytes of which `text` is the one and only base32, or None."""
    if not isinstance(text, str) or len(text) != _ID_SIZE:
        return None
    try:
        data = base64.b32decode(text.upper() + "====")
    except ValueError:
        return None
    return data if node_id_of(data) == text else None


def verify(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Return whether `signature` (64 bytes) is that of `data` by the owner of `public_key` (32 bytes). About 50 µs."""
    try:
        sodium.crypto_sign_open(signature + data, public_key)
    except BadSignatureError:
        return False
    return True


# --- the identity -------------------------------------------------------------------------------------------


class Identity:
    """The key pair of a node. Made by `generate`, `from_seed` or `load_or_create`; it never changes.

    It cannot be pickled or copied: what needs it is given this one.
    """

    __slots__ = ("_node_id", "_public_key", "_secret_key")

    def __init__(self, seed: bytes) -> None:
        public_key, secret_key = sodium.crypto_sign_seed_keypair(Secret(seed))
        self._public_key = public_key
        self._secret_key = Secret(secret_key)
        self._node_id = node_id_of(public_key)

    @classmethod
    def generate(cls) -> Self:
        """Return a new identity, which is gone with this object: see `load_or_create` for one that stays."""
        return cls(Secret(random_bytes(_KEY_SIZE)))

    @classmethod
    def from_seed(cls, seed: bytes) -> Self:
        """Return the identity of 32 bytes: always the same for the same seed, which is as secret as the key.

        Raises:
            TypeError: `seed` is not bytes.
            ValueError: It is not 32 bytes long, or all zeros.
        """
        refusal = _refusal(seed)
        if refusal is None:
            return cls(seed)
        del seed  # a traceback that renders variables must not show it
        raise refusal

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> Self:
        """Return the identity that is kept in the file `path`; if there is no such file, make one for a new identity.

        The file is text, for its owner only (mode 0600). It appears at once and complete, and is never replaced: of
        processes that start at the same time one makes it, and all have the same identity. Blocks, for some ms.

        Raises:
            ValueError: What is there cannot be used; the message says why, and what to do.
            OSError: The operating system refused to read or to make it; its directory must exist.
        """
        path = Path(path)
        try:
            found = _read(path)
        except FileNotFoundError:
            if path.is_symlink():
                raise ValueError(f"{path} is a symbolic link to nothing: remove it, or mend it") from None
            _create(path)
            found = _read(path)
        if isinstance(found, Secret):
            return cls(found)
        raise ValueError(f"{path} {found}")

    @property
    def node_id(self) -> str:
        """The public key as text: 52 characters of base32, in lower case."""
        return self._node_id

    @property
    def public_key(self) -> bytes:
        """The public key: 32 bytes."""
        return self._public_key

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._node_id!r})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("an Identity holds a secret key and cannot be pickled or copied: load it where it is needed")

    def sign(self, data: bytes) -> bytes:
        """Return the signature of `data`, 64 bytes: always the same for the same data. About 20 µs."""
        return sodium.crypto_sign(data, self._secret_key)[:SIGNATURE_SIZE]

    def shared_with(self, node_id: str, context: str) -> Encryptor:
        """Return an Encryptor under a key that nobody can compute but this node and `node_id`, who gets the same.

        The key is derived, for this `context`, from the X25519 agreement (RFC 7748) of the two identities. It is the
        same in both directions: say in `context` which one is meant, or each node would open what it sealed itself.
        Keep the Encryptor: it takes about 300 µs to make.

        Raises:
            ValueError: `node_id` is not a node id, or `context` is empty.
        """
        theirs = sodium.crypto_sign_ed25519_pk_to_curve25519(public_key_of(node_id))
        ours = Secret(sodium.crypto_sign_ed25519_sk_to_curve25519(self._secret_key))
        return Encryptor.derive(Secret(sodium.crypto_scalarmult(ours, theirs)), context)


def _refusal(seed: Any) -> TypeError | ValueError | None:
    """Return what is wrong with a seed, without showing it."""
    if not isinstance(seed, bytes):
        return TypeError(f"seed must be exactly {_KEY_SIZE} bytes, not {type(seed).__name__}")
    if len(seed) != _KEY_SIZE:
        return ValueError(f"seed must be exactly {_KEY_SIZE} bytes, not {len(seed)}")
    return None if any(seed) else ValueError("seed is all zeros: it was never filled in")


# --- the key file -------------------------------------------------------------------------------------------
# One line: what it is, the node id, the seed. The id tells people whose file it is, and us that no bit is damaged.

_FILE_SIZE = len("meshkit-identity-1") + 2 * (1 + _ID_SIZE) + 1
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a FIFO must not make us wait


def _content(seed: bytes) -> bytes:
    return f"meshkit-identity-1 {Identity(seed).node_id} {node_id_of(seed)}\n".encode()


def _read(path: Path) -> Secret | str:
    """Return the seed in the file, or what is wrong with the file."""
    descriptor = os.open(path, _READ)
    try:
        status = os.fstat(descriptor)  # of what was opened: the path may have come to mean another file since
        if not stat.S_ISREG(status.st_mode):
            return "is not a file: give the path of a file for the key, which is made if it is not there"
        if os.name == "posix" and status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            return (
                f"may be used by others (mode {mode:04o}): make it yours alone with chmod 600; if others may have read "
                "it, delete it instead, and a new identity is made"
            )
        content = Secret(os.read(descriptor, _FILE_SIZE + 1))
    finally:
        os.close(descriptor)
    seed = _decoded(content[-_ID_SIZE - 1 : -1].decode("ascii", "replace"))
    if seed is None or _content(seed) != content:
        what = "is not a key file, or is damaged" if content else "is empty"
        return f"{what}: give another path, or restore it from a backup; if you delete it, a new identity is made"
    return Secret(seed)


def _create(path: Path) -> None:
    """Make the file for a new identity, unless somebody else was faster."""
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "make this directory for the key file first", str(path.parent))
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with open(descriptor, "wb") as file:
            file.write(_content(random_bytes(_KEY_SIZE)))
            file.flush()
            os.fsync(descriptor)  # so that after a power failure, too, the file is complete or not there
        os.link(draft, path)  # not a rename, which would replace the file of another process
    except FileExistsError:
        pass
    except OSError as error:
        error.add_note("The key file is made as a hard link, which not every file system has: try another directory.")
        raise
    finally:
        os.unlink(draft)
