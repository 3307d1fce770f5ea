"""The cores of the transport over NATS: who is up, and the addresses of servers. Replays are tried against a model."""

import random

import pytest
from hypothesis import given, strategies as st

from meshkit.runtime.identity import Identity
from meshkit.transports._nats.announcement import NO_ECHO, Announcement, Says
from meshkit.transports._nats.company import Company, Then
from meshkit.transports._nats.servers import Server, Servers

ME, BOBS, OTHERS = b"m" * 16, b"b" * 16, b"c" * 16


def here(number: int, echo: bytes = NO_ECHO, session: bytes = BOBS, says: Says = Says.HERE) -> Announcement:
    return Announcement(says, session, number, echo)


def test_a_node_is_up_when_it_has_echoed_the_session_and_not_before() -> None:
    company = Company(ME, 10)
    assert company.heard("bob", here(1)) == Then(answer=Says.HERE_AND_WHO_ARE_YOU)
    assert company.heard("bob", here(1)) == Then(), "it is asked once in a tick"
    company.tick()
    assert company.heard("bob", here(2)) == Then(answer=Says.HERE_AND_WHO_ARE_YOU)
    assert company.heard("bob", here(3, OTHERS)) == Then(), "an echo for another one is none"
    assert not company.peers
    assert company.heard("bob", here(4, ME)) == Then(found=True)
    assert company.heard("bob", here(5, says=Says.HERE_AND_WHO_ARE_YOU)) == Then(answer=Says.HERE)
    assert list(company.peers) == ["bob"]


def test_who_is_found_and_asks_is_answered_before_anything_else_is_sent() -> None:
    then = Company(ME, 10).heard("bob", here(1, ME, says=Says.HERE_AND_WHO_ARE_YOU))
    assert then == Then(answer=Says.HERE, found=True)


def test_a_node_is_lost_after_two_heartbeats_of_silence_or_soon_when_nobody_seems_to_be_there() -> None:
    company = Company(ME, 10)
    company.heard("bob", here(1, ME))
    for number in range(2, 5):
        assert [company.tick() for _ in range(7)] == [[]] * 7
        company.heard("bob", here(number))
    assert company.doubt("bob")
    assert not company.doubt("bob"), "it was asked"
    assert not company.doubt("nobody")
    assert company.tick() == []
    company.heard("bob", here(5))
    assert [company.tick() for _ in range(8)] == [[]] * 7 + [["bob"]]
    company.heard("bob", here(6, ME))
    assert company.doubt("bob")
    assert [company.tick() for _ in range(2)] == [[], ["bob"]]


def test_a_goodbye_and_a_new_session_are_losses_and_old_announcements_are_nothing() -> None:
    company = Company(ME, 10)
    company.heard("bob", here(5, ME))
    for old in (here(5), here(4, ME), here(5, says=Says.GOODBYE), here(9, session=OTHERS, says=Says.GOODBYE)):
        assert company.heard("bob", old) == Then()
    assert company.heard("bob", here(1, ME, OTHERS)) == Then(lost=True, found=True)
    assert company.heard("bob", here(5, ME)) == Then(), "the echo of a session that was lost is worth nothing"
    assert company.heard("bob", here(2, session=OTHERS, says=Says.GOODBYE)) == Then(lost=True)
    assert company.heard("bob", here(2, ME, OTHERS)) == Then()
    assert company.heard("bob", here(3, ME, OTHERS)) == Then(found=True), "it was frozen, and goes on"


def test_there_is_a_limit_to_what_is_remembered() -> None:
    company = Company(ME, 2)
    for node in ("alice", "bob"):
        company.heard(node, here(1, ME))
    assert company.heard("carol", here(1)) == Then(full=True)
    assert company.heard("carol", here(2, ME)) == Then(answer=Says.GOODBYE, full=True)
    assert company.heard("bob", here(1, ME, OTHERS)) == Then(lost=True, found=True), "who is up may start again"
    company.MAX_PAST = 3
    for number in range(10):
        company.heard("bob", here(1, ME, number.to_bytes(16)))
    assert len(company._past) == 3


class Bob:
    """A model of a node: what it has ever said, all of which others may have recorded."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.said: list[Announcement] = []
        self.alive = False
        self.session, self.number = b"", 0

    def starts(self) -> None:
        self.alive, self.session, self.number = True, self.rng.randbytes(16), 0

    def says(self, says: Says, echo: bytes = NO_ECHO) -> Announcement:
        self.number += 1
        self.said.append(Announcement(says, self.session, self.number, echo))
        return self.said[-1]


@given(
    st.lists(st.sampled_from(["start", "kill", "leave", "beat", "tick", "replay", "doubt", "reconnect"])),
    st.integers(0),
)
def test_whatever_is_replayed_the_dead_do_not_live_and_the_living_do_not_die(actions: list[str], seed: int) -> None:
    rng = random.Random(seed)
    bob, company = Bob(rng), Company(ME, 10)
    unheard = 0  # ticks for which bob himself has said nothing

    def hears(told: Announcement) -> None:
        for _ in range(3):  # what is asked is answered at once, by who is alive
            then = company.heard("bob", told)
            if then.answer is None or not bob.alive:
                return
            told = bob.says(Says.HERE, company.session)

    for action in actions:
        if action == "start":
            bob.starts()
            hears(bob.says(Says.HERE_AND_WHO_ARE_YOU))
        elif action == "kill":
            bob.alive = False
        elif action == "leave" and bob.alive:
            bob.alive = False
            company.heard("bob", bob.says(Says.GOODBYE))
            assert "bob" not in company.peers
        elif action == "beat" and bob.alive:
            hears(bob.says(Says.HERE))
        elif action == "replay" and bob.said:
            before, then = "bob" in company.peers, company.heard("bob", rng.choice(bob.said))
            assert not then.found
            assert ("bob" in company.peers) == before, "a replay changes nothing"
        elif action == "doubt" and company.doubt("bob") and bob.alive:
            hears(bob.says(Says.HERE, company.session))
        elif action == "reconnect":
            company = Company(rng.randbytes(16), 10)
            if bob.alive:
                hears(bob.says(Says.HERE))
        elif action == "tick":
            company.tick()
        if action in {"start", "beat", "reconnect"} and bob.alive:
            unheard = 0
            # It may have been asked in this tick already, if somebody has replayed what it says in this session.
            company.tick()
            hears(bob.says(Says.HERE))
            assert "bob" in company.peers
        elif action == "tick":
            unheard += 1
        if unheard >= Company.PATIENCE or (not bob.alive and action == "reconnect"):
            assert "bob" not in company.peers


# --- announcements


def test_an_announcement_is_read_with_the_right_key_on_the_right_subject_only() -> None:
    alice, bob = Identity.from_seed(b"a" * 32), Identity.from_seed(b"b" * 32)
    told = here(7, ME)
    data = told.signed(alice, b"mesh.all.alice.here")
    assert Announcement.read(data, b"mesh.all.alice.here", alice.public_key) == told
    assert Announcement.read(data, b"mesh.all.alice.here", bob.public_key) is None
    assert Announcement.read(data, b"mesh.bob.alice.here", alice.public_key) is None
    for number in range(len(data)):
        broken = data[:number] + bytes([data[number] ^ 1]) + data[number + 1 :]
        assert Announcement.read(broken, b"mesh.all.alice.here", alice.public_key) is None
        assert Announcement.read(data[:number], b"mesh.all.alice.here", alice.public_key) is None
    assert Announcement.read(data + b"x", b"mesh.all.alice.here", alice.public_key) is None
    later = told._replace(says=9)  # type: ignore[arg-type]
    assert Announcement.read(later.signed(alice, b"x"), b"x", alice.public_key) is None


# --- servers


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("nats://127.0.0.1:4333", Server("127.0.0.1", 4333)),
        ("127.0.0.1:4333", Server("127.0.0.1", 4333)),
        ("nats.example", Server("nats.example", 4222)),
        ("tls://nats.example/", Server("nats.example", 4222, tls=True)),
        ("nats://[::1]:4333", Server("::1", 4333)),
        ("nats://u:p%40%2F@one:1", Server("one", 1, user="u", password="p@/")),
        ("nats://tok%40en@one:1", Server("one", 1, token="tok@en")),
    ],
)
def test_a_server_is_a_url(url: str, expected: Server) -> None:
    server = Server.parse(url)
    assert server == expected
    assert Server.parse(server.url) == Server(server.host, server.port, server.tls)


@pytest.mark.parametrize(
    "url",
    ["", "nats://", "http://one", "nats://one:x", "nats://one:0", "nats://one:99999", "nats://one/path", "a b", None],
)
def test_what_is_no_server_is_refused(url: object) -> None:
    with pytest.raises(ValueError, match=f"a server must be a URL such as .*not {str(url)!r}|not None"):
        Server.parse(url)


def test_passwords_do_not_show() -> None:
    server = Server.parse("nats://user:secret@one")
    assert "secret" not in f"{server!r} {server} {server.url} {Server.parse('secret@one')!r}"
    with pytest.raises(ValueError, match="a server must be") as caught:
        Server.parse("http://user:secret@one")
    assert "secret" not in str(caught.value)


def test_who_was_lost_is_tried_last_and_what_is_discovered_replaces_what_was() -> None:
    one, two, three, four = (Server.parse(f"nats://{name}") for name in ("one", "two", "three", "four"))
    servers = Servers([one, two])
    assert servers.in_order() == [one, two]
    servers.lost(one)
    assert servers.in_order() == [two, one]
    servers.discovered([two.other("one", 4222), three, three])
    assert servers.in_order() == [two, three, one]
    servers.discovered([four])
    servers.lost(two)
    assert servers.in_order() == [one, four, two]
    servers.discovered([])
    assert servers.in_order() == [one, four, two]
    servers.discovered(Server("many", port) for port in range(1, 1000))
    assert len(servers.in_order()) == 102
