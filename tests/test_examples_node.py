"""One node per process: that the story ends well, and says so when it does not; and what people are told."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from examples.node import story
from examples.node.__main__ import run
from meshkit import Identity
from tests.transports.nats_servers import NatsServer, needs_a_server

pytestmark = pytest.mark.real_time
FORGER = "from examples.node.__main__ import run; from tests.test_examples_mesh import Forger; run(Forger)"
ROOT = Path(story.__file__).parents[2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "it's a file"
    path.write_bytes(os.urandom(150_000))
    return path


def test_the_file_of_a_killed_owner_comes_back_from_the_confidants(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert story.main(file, {}) == 0
    out = capsys.readouterr().out
    assert out.count("gave back 150,000 bytes") == 2
    assert "NO" not in out.split("summary")[1]


@needs_a_server
def test_the_same_story_over_nats(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with NatsServer() as server:
        assert story.main(file, {}, [server.url]) == 0
    assert "NO" not in capsys.readouterr().out.split("summary")[1]


def test_confidants_that_give_other_bytes_back_are_named_and_the_story_fails(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forger = [sys.executable, "-c", FORGER]
    assert story.main(file, {"carol": forger, "dave": forger}) == 1
    out = capsys.readouterr().out
    assert "carol did not give it back: BadSeal" in out
    assert "nothing recovered" in out
    assert "byte for byte (150,000 bytes): NO" in out
    assert "gave it back: carol, dave: NO" in out


def children(of: int) -> set[int]:
    """Return the processes that this one has started."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == of:
            found.add(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system does not tell who started whom")
def test_a_story_that_is_interrupted_leaves_no_process_behind() -> None:
    command = [sys.executable, "-m", "examples.node.story"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as told:
        assert told.stdout is not None
        assert told.stderr is not None
        assert any("SIGSTOP" in line for line in told.stdout)
        nodes = children(told.pid)
        assert len(nodes) >= 4
        told.send_signal(signal.SIGINT)
        assert told.stderr.read() == ""
        told.stdout.read()
    assert told.returncode == 130
    assert not any(Path(f"/proc/{node}").exists() for node in nodes)


# --- one node


@contextmanager
def node(*options: str, stdin: int = subprocess.PIPE, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """Run a node, and end it."""
    command = [sys.executable, "-m", "examples.node", *options]
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    with subprocess.Popen(command, stdin=stdin, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: "subprocess.Popen[str]", words: str) -> str:
    assert process.stdout is not None
    return next(line for line in process.stdout if words in line)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_node_that_is_told_to_end_leaves_the_mesh_first(number: signal.Signals, tmp_path: Path) -> None:
    key = str(tmp_path / "a.key")
    with node("--name", "alice", "--key", key, "--listen", "127.0.0.1:0", stdin=subprocess.DEVNULL) as process:
        wait_for(process, "listens on")
        process.send_signal(number)
        out, error = process.communicate(timeout=20)
    assert (out, error, process.returncode) == ("alice leaves the mesh\n", "", 0)


def test_a_node_does_what_is_piped_into_it_says_what_it_cannot_and_ends_with_its_input(tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    huge.touch()
    os.truncate(huge, 200 * 2**30)  # of which no block is there
    commands = (
        "peers\n\nnonsense\ntease bob\nstash nowhere\nstash 'half\nrecover .\nrecover no/a\nrecover a\n"
        f"stash /dev/zero\nstash .\nstash {huge}"
    )
    with node("--name", "alice", "--key", str(tmp_path), "--listen", "127.0.0.1:0") as process:
        out, error = process.communicate(commands, timeout=20)
    assert out.splitlines()[2:] == [
        "0 are here, and alice",
        *f"""\
peers          who is here
stash FILE     seal it, and leave it with three others
recover FILE   get back what was stashed, from all who have it, and write it to FILE
tease NAME     for all to hear
quit           leave the mesh
tease bob: there is no bob here, only this node
stash nowhere: there is no such file
stash 'half: No closing quotation
recover .: there is such a file already: give another name
recover no/a: there is no directory no: make it first
nothing recovered: nobody here gave it
stash /dev/zero: it is not a file
stash .: it is not a file
stash {huge}: the file is too large: a stash takes 65,536,000 bytes
alice leaves the mesh""".splitlines(),
    ]
    assert (error, process.returncode) == ("", 0)
    assert Identity.load_or_create(tmp_path / "alice.key").node_id in out


def test_what_the_terminal_cannot_show_is_written_in_another_way(tmp_path: Path) -> None:
    options = ["--name", "zoë", "--key", str(tmp_path), "--listen", "127.0.0.1:0"]
    with node(*options, PYTHONIOENCODING="ascii") as process:
        out, error = process.communicate("tease zoë", timeout=20)
    assert out.splitlines()[-1] == "zo\\xeb leaves the mesh"
    assert (error, process.returncode) == ("", 0)


def test_a_node_goes_on_when_nobody_reads_what_it_says(tmp_path: Path) -> None:
    key = str(tmp_path)
    with node("--name", "alice", "--key", key, "--listen", "127.0.0.1:0") as alice:
        address = wait_for(alice, "listens on").split()[-1]
        with node("--name", "bob", "--key", key, "--join", address) as bob:
            wait_for(bob, "alice is here")
            assert bob.stdin is not None
            assert bob.stdout is not None
            assert bob.stderr is not None
            bob.stdout.close()
            bob.stdin.write("peers\nnonsense\ntease alice\n")
            bob.stdin.flush()
            wait_for(alice, "bob teased alice")
            bob.stdin.close()
            assert (bob.wait(20), bob.stderr.read()) == (0, "")


def test_all_that_have_a_name_are_teased(tmp_path: Path) -> None:
    one, other = (str(tmp_path / name) for name in ("one", "other"))
    with node("--name", "alice", "--key", one, "--listen", "127.0.0.1:0") as alice:
        address = wait_for(alice, "listens on").split()[-1]
        with (
            node("--name", "alice", "--key", other, "--listen", "127.0.0.1:0", "--join", address) as again,
            node("--name", "bob", "--key", str(tmp_path), "--join", address) as bob,
        ):
            wait_for(bob, "alice is here")
            wait_for(bob, "alice is here")
            assert bob.stdin is not None
            bob.stdin.write("tease alice\n")
            bob.stdin.flush()
            wait_for(bob, "alice is teased")
            wait_for(alice, "bob teased alice")
            wait_for(again, "bob teased alice")


def test_a_stranger_and_the_one_it_comes_to_are_both_told_why_it_is_not_let_in(tmp_path: Path) -> None:
    key = ["--key", str(tmp_path)]
    alice = Identity.load_or_create(tmp_path / "alice.key").node_id
    with node("--name", "alice", *key, "--listen", "127.0.0.1:0", "--trust", alice) as process:
        address = wait_for(process, "listens on").split()[-1]
        with node("--name", "eve", *key, "--join", address) as stranger:
            refused = wait_for(stranger, "cannot be joined")
        assert "it does not trust this node: add the id of this node to its trust=" in refused
        assert Identity.load_or_create(tmp_path / "eve.key").node_id in wait_for(process, "is not trusted")


def test_where_nobody_listens_yet_is_said_once_and_tried_again(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with node("--name", "bob", "--key", str(tmp_path), "--join", address) as bob:
        assert "nobody listens there" in wait_for(bob, f"{address} cannot be joined, and is tried again and again")
        with node("--name", "alice", "--key", str(tmp_path), "--listen", address):
            wait_for(bob, "alice is here")


# --- what cannot be


def fails(monkeypatch: pytest.MonkeyPatch, *options: str) -> SystemExit:
    monkeypatch.setattr(sys, "argv", ["node", "--name", "alice", *options])
    with pytest.raises(SystemExit) as caught:
        run()
    return caught.value


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "say where it listens with --listen and whom it joins with --join; or, over NATS, only --nats"),
        (["--listen", ":0", "--nats", "nats://127.0.0.1"], "or, over NATS, only --nats"),
        (["--nats", "nats://127.0.0.1"], "this reaches beyond this machine: say with --trust whom it trusts"),
        (["--nats", "http://127.0.0.1"], "http://127.0.0.1"),
        (["--listen", "7001"], 'listen must be "host:port", such as "127.0.0.1:7001"'),
        (["--listen", ":7001"], "this reaches beyond this machine: say with --trust whom it trusts"),
        (["--join", "127.0.0.1:x"], "an address in join must be"),
        (["--listen", ":0", "--trust", "bob"], "argument --trust: 'bob' is not a node id"),
        (["--name", "../alice"], "a name is up to 64 letters, digits, _, . and -, not '../alice'"),
    ],
)
def test_what_was_typed_wrongly_is_said_in_a_line(
    options: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(monkeypatch, *options).code == 2
    assert says in capsys.readouterr().err


def test_a_busy_port_no_server_and_a_key_that_cannot_be_used_are_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        error = fails(monkeypatch, "--key", str(tmp_path), "--listen", address)
    assert f"cannot listen on {address}: another process listens there" in str(error.code)
    (tmp_path / "bad.key").write_text("nonsense")
    (tmp_path / "bad.key").chmod(0o600)
    error = fails(monkeypatch, "--key", str(tmp_path / "bad.key"), "--listen", "127.0.0.1:0")
    assert "bad.key is not a key file, or is damaged" in str(error.code)
    trust = ["--trust", Identity.generate().node_id]
    error = fails(monkeypatch, "--key", str(tmp_path), "--nats", f"nats://{address}", *trust)
    assert f"NATS server {address}: nobody listens there" in str(error.code)
    error = fails(monkeypatch, "--key", str(tmp_path / "no" / "key"), "--id")
    assert str(error.code).startswith("alice: make this directory for the key file first")
    error = fails(monkeypatch, "--key", "x" * 1000, "--id")
    assert str(error.code).startswith("alice: File name too long")


def test_the_id_is_the_same_each_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["node", "--name", "alice", "--id", "--key", str(tmp_path)])
    run()
    run()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second == Identity.load_or_create(tmp_path / "alice.key").node_id
