import base64
import copy
import os
import pathlib
import pickle
import stat
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable

import pytest
from hypothesis import given, strategies as st

from meshkit.errors import BadSeal
from meshkit.runtime.identity import SIGNATURE_SIZE, Identity, node_id_of, public_key_of, verify

P = 2**255 - 19
seeds = st.binary(min_size=32, max_size=32).filter(any)
SEED = bytes(range(32))
ALICE, BOB, EVE = (Identity.from_seed(letter * 32) for letter in (b"a", b"b", b"e"))


# --- ids ----------------------------------------------------------------------------------------------------


@given(seeds)
def test_a_node_id_is_its_public_key_as_text_and_back(seed: bytes) -> None:
    identity = Identity.from_seed(seed)
    assert public_key_of(identity.node_id) == identity.public_key
    assert node_id_of(identity.public_key) == identity.node_id
    assert len(identity.node_id) == 52
    assert identity.node_id == identity.node_id.lower()


def test_a_seed_gives_the_key_of_rfc_8032() -> None:
    """Section 7.1, test 2: a key, and its signature of one byte."""
    identity = Identity.from_seed(bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    assert identity.public_key.hex() == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    assert identity.sign(b"\x72").hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )


def other_texts_of_one_key() -> list[object]:
    node_id = ALICE.node_id
    spare = "abcdefghijklmnopqrstuvwxyz234567"
    last = spare.index(node_id[-1])
    return [
        node_id.upper(),
        node_id.capitalize(),
        node_id + "====",
        node_id + "\n",
        " " + node_id[1:],
        node_id[:-1] + spare[last + 1],  # a bit that counts for nothing
        node_id[:-1],
        node_id + "a",
        ALICE.public_key.hex(),
        ALICE.public_key,
        node_id.encode(),
    ]


@pytest.mark.parametrize("text", other_texts_of_one_key())
def test_a_key_has_only_one_text(text: str) -> None:
    with pytest.raises(ValueError, match="is not a node id, which is a public key as 52 characters of base32"):
        public_key_of(text)


@pytest.mark.parametrize(
    "text", ["", "=" * 52, "\u0131" * 52, "\0" * 52, "1" * 52, "a=" * 26, None, 7, [], "x" * 10**6]
)
def test_what_is_no_node_id_at_all_is_a_value_error_of_bearable_length(text: str) -> None:
    with pytest.raises(ValueError, match="is not a node id") as caught:
        public_key_of(text)
    assert len(str(caught.value)) < 200


def on_no_curve() -> bytes:
    return next(key for n in range(2, 50) if refused(key := n.to_bytes(32, "little")))


def refused(key: bytes) -> bool:
    try:
        public_key_of(node_id_of(key))
    except ValueError:
        return True
    return False


def mixed_order() -> bytes:
    """Return the sum of a good key and the point (0, -1), which has order two: (-x, -y)."""
    y = int.from_bytes(ALICE.public_key, "little")
    sign, y = y >> 255, y & (2**255 - 1)
    return ((P - y) | ((1 - sign) << 255)).to_bytes(32, "little")


# All eight points of small order, with either sign, and in the forms that are not canonical.
SMALL = [
    0,
    1,
    P - 1,
    P,
    P + 1,
    int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"),
    int.from_bytes(bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little"),
]


@pytest.mark.parametrize(
    "key",
    [(y | sign << 255).to_bytes(32, "little") for y in SMALL for sign in (0, 1)]
    + [n.to_bytes(32, "little") for n in range(P, 2**255)]
    + [on_no_curve(), mixed_order(), b"\xff" * 32],
)
def test_a_key_of_small_order_or_none_at_all_is_no_node_id(key: bytes) -> None:
    with pytest.raises(ValueError, match="is not a node id"):
        public_key_of(node_id_of(key))
    with pytest.raises(ValueError, match="is not a node id"):
        ALICE.shared_with(node_id_of(key), "test")
    assert not verify(key, bytes(SIGNATURE_SIZE), b"data")


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz234567", min_size=52, max_size=52) | st.text())
def test_any_text_is_the_only_one_of_its_key_or_a_value_error(text: str) -> None:
    try:
        key = public_key_of(text)
    except ValueError:
        return
    assert node_id_of(key) == text


# --- what it does -------------------------------------------------------------------------------------------


@given(seeds, st.binary(max_size=100), st.integers(0, 511), st.binary(max_size=100))
def test_a_signature_is_good_for_its_key_and_data_alone(seed: bytes, data: bytes, bit: int, other: bytes) -> None:
    identity = Identity.from_seed(seed)
    signature = identity.sign(data)
    assert len(signature) == SIGNATURE_SIZE
    assert verify(identity.public_key, signature, data)
    assert verify(identity.public_key, signature, other) is (other == data)
    assert not verify(Identity.generate().public_key, signature, data)
    flipped = (int.from_bytes(signature, "big") ^ 1 << bit).to_bytes(SIGNATURE_SIZE, "big")
    assert not verify(identity.public_key, flipped, data)


def test_what_two_share_opens_for_them_in_this_context_only() -> None:
    sealed = ALICE.shared_with(BOB.node_id, "one").seal(b"data")
    assert BOB.shared_with(ALICE.node_id, "one").open(*sealed) == b"data"
    others = [
        BOB.shared_with(ALICE.node_id, "two"),
        BOB.shared_with(EVE.node_id, "one"),
        EVE.shared_with(ALICE.node_id, "one"),
        EVE.shared_with(BOB.node_id, "one"),
    ]
    for other in others:
        with pytest.raises(BadSeal):
            other.open(*sealed)


def test_generated_identities_differ() -> None:
    assert len({Identity.generate().node_id for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("seed", "kind", "says"),
    [
        (b"short, and a hush", ValueError, "seed must be exactly 32 bytes, not 17"),
        (b"", ValueError, "seed must be exactly 32 bytes, not 0"),
        (b"long, and a hush" * 3, ValueError, "seed must be exactly 32 bytes, not 48"),
        (bytes(32), ValueError, "seed is all zeros: it was never filled in"),
        ("text, and a hush", TypeError, "seed must be exactly 32 bytes, not str"),
        (bytearray(b"array, and a hush"), TypeError, "seed must be exactly 32 bytes, not bytearray"),
        (None, TypeError, "seed must be exactly 32 bytes, not NoneType"),
    ],
)
def test_a_seed_that_is_none_is_refused_and_not_shown(seed: bytes, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        Identity.from_seed(seed)
    assert "hush" not in library_frames(caught.value)


# --- what it does not show ----------------------------------------------------------------------------------


def library_frames(error: BaseException) -> str:
    """Return the traceback as tools show it that render variables, from our own first frame on."""
    shown = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    return shown[shown.index("/identity.py") :]


def secrets_of(seed: bytes) -> list[str]:
    forms = []
    for part in (seed, seed[:8], seed[-8:]):
        forms += [part.hex(), repr(part)[2:-1], base64.b64encode(part)[:-4].decode()]
    return [*forms, node_id_of(seed)]


def assert_hidden(shown: str, seed: bytes) -> None:
    for form in secrets_of(seed):
        assert form not in shown


def test_it_shows_its_id_and_never_its_secret() -> None:
    identity = Identity.from_seed(SEED)
    assert repr(identity) == f"Identity('{identity.node_id}')"
    everything = [getattr(identity, name) for name in dir(identity)]
    assert_hidden(f"{identity} {identity!r} {everything} {everything!s} %s" % (identity,), SEED)
    assert not hasattr(identity, "__dict__")
    with pytest.raises(TypeError):
        vars(identity)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_cannot_be_pickled_or_copied(protocol: int) -> None:
    identity = Identity.from_seed(SEED)
    with pytest.raises(TypeError, match="an Identity holds a secret key and cannot be pickled or copied"):
        pickle.dumps([identity], protocol)
    with pytest.raises(TypeError, match="holds a secret key"):
        copy.copy(identity)
    with pytest.raises(TypeError, match="holds a secret key"):
        copy.deepcopy(identity)


def test_tracebacks_that_render_variables_do_not_show_the_secret() -> None:
    identity = Identity.from_seed(SEED)
    attempts: list[Callable[[], object]] = [
        lambda: identity.sign("text"),  # type: ignore[arg-type]
        lambda: identity.shared_with("nobody", "test"),
        lambda: identity.shared_with(BOB.node_id, ""),
        lambda: identity.shared_with(BOB.node_id, 7),  # type: ignore[arg-type]
    ]
    for attempt in attempts:
        with pytest.raises((TypeError, ValueError)) as caught:
            attempt()
        assert_hidden(library_frames(caught.value), SEED)


# --- the key file -------------------------------------------------------------------------------------------


def test_a_key_file_is_made_once_for_its_owner_alone(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "node.key"
    made = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    assert Identity.load_or_create(str(path)).node_id == made.node_id
    assert path.read_bytes() == before
    assert made.node_id.encode() in before
    assert os.listdir(tmp_path) == ["node.key"]  # no draft is left
    loaded = Identity.load_or_create(path)
    assert verify(made.public_key, loaded.sign(b"data"), b"data")


def test_the_mode_of_a_new_file_does_not_depend_on_the_umask(tmp_path: pathlib.Path) -> None:
    before = os.umask(0)
    try:
        Identity.load_or_create(tmp_path / "open")
        os.umask(0o377)
        Identity.load_or_create(tmp_path / "closed")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "closed").stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o666, 0o777, 0o610, 0o620, 0o601])
def test_a_file_that_others_may_use_is_refused(tmp_path: pathlib.Path, mode: int) -> None:
    path = tmp_path / "node.key"
    Identity.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(
        ValueError, match=rf"node\.key may be used by others \(mode {mode:04o}\): .* chmod 600; .*delete"
    ):
        Identity.load_or_create(path)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
def test_a_file_of_its_owner_alone_is_read(tmp_path: pathlib.Path, mode: int) -> None:
    path = tmp_path / "node.key"
    made = Identity.load_or_create(path)
    path.chmod(mode)
    assert Identity.load_or_create(path).node_id == made.node_id


def refusal(path: pathlib.Path, content: bytes) -> str:
    path.unlink(missing_ok=True)
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="restore it from a backup") as caught:
        Identity.load_or_create(path)
    assert path.read_bytes() == content, "it was replaced"
    return str(caught.value)


def test_a_file_cut_short_anywhere_is_refused_and_kept(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "node.key"
    Identity.load_or_create(path)
    content = path.read_bytes()
    assert "is empty: give another path" in refusal(path, b"")
    for length in range(1, len(content)):
        assert "is not a key file, or is damaged: give another path" in refusal(path, content[:length])


def test_a_file_with_any_bit_flipped_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "node.key"
    Identity.load_or_create(path)
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            refusal(path, bytes(damaged))


@pytest.mark.parametrize("extra", [b"\n", b"\r\n", b" ", b"\0", b"x" * 10_000_000])
def test_a_file_that_is_too_long_is_refused(tmp_path: pathlib.Path, extra: bytes) -> None:
    path = tmp_path / "node.key"
    Identity.load_or_create(path)
    content = path.read_bytes()
    refusal(path, content + extra)
    refusal(path, extra + content)


@pytest.mark.parametrize(
    "content", [SEED, SEED.hex().encode(), b"-----BEGIN OPENSSH PRIVATE KEY-----\n" * 9, b"\xff" * 126]
)
def test_another_kind_of_file_is_refused_and_not_shown(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a key file") as caught:
        Identity.load_or_create(path)
    shown = library_frames(caught.value)
    assert_hidden(shown, SEED)
    assert "OPENSSH" not in shown


def test_a_directory_or_a_pipe_is_refused_at_once(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="is not a file: give the path of a file for the key"):
            Identity.load_or_create(path)


def test_a_missing_directory_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"make this directory for the key file first: .*missing'"):
        Identity.load_or_create(tmp_path / "missing" / "node.key")


def test_a_symbolic_link_is_followed_and_its_target_must_be_private(tmp_path: pathlib.Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    made = Identity.load_or_create(target)
    link.symlink_to(target)
    assert Identity.load_or_create(link).node_id == made.node_id
    target.chmod(0o644)
    with pytest.raises(ValueError, match="may be used by others"):
        Identity.load_or_create(link)


def test_a_symbolic_link_to_nothing_is_refused_and_nothing_is_made(tmp_path: pathlib.Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="link is a symbolic link to nothing: remove it, or mend it"):
        Identity.load_or_create(link)
    assert os.listdir(tmp_path) == ["link"]


def test_a_file_system_without_hard_links_says_so(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(PermissionError) as caught:
        Identity.load_or_create(tmp_path / "node.key")
    assert "hard link" in caught.value.__notes__[0]
    assert os.listdir(tmp_path) == []


def test_threads_that_start_at_once_end_with_one_identity(tmp_path: pathlib.Path) -> None:
    for round_ in range(20):
        path = tmp_path / f"{round_}.key"
        barrier = threading.Barrier(8)
        ids: list[str] = []

        def start(path: pathlib.Path = path, barrier: threading.Barrier = barrier, ids: list[str] = ids) -> None:
            barrier.wait()
            ids.append(Identity.load_or_create(path).node_id)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(ids) == 8
        assert len(set(ids)) == 1
    assert len(os.listdir(tmp_path)) == 20


PROCESS = """
import pathlib, sys
from meshkit.runtime.identity import Identity
print("ready", flush=True)
for path in sys.stdin.readline().split():
    print(Identity.load_or_create(path).node_id)
"""


def test_processes_that_start_at_once_end_with_one_identity(tmp_path: pathlib.Path) -> None:
    paths = " ".join(str(tmp_path / f"{n}.key") for n in range(50)) + "\n"
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS], stdin=pipe, stdout=pipe, text=True, bufsize=1) for _ in "123"
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(paths)
    first, *others = [process.communicate()[0].split() for process in processes]
    assert others == [first, first]
    assert len(set(first)) == len(os.listdir(tmp_path)) == 50
