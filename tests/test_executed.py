from meshkit._executed import did_not_start
from meshkit.errors import Closed, PeerLost, Unreachable


def test_only_an_error_that_says_so_did_not_start() -> None:
    assert did_not_start(Unreachable(node="bob"))
    assert did_not_start(Closed(name="pool"))
    assert not did_not_start(Closed(name="pool", executed="maybe"))
    assert not did_not_start(PeerLost(node="bob"))
    assert not did_not_start(OSError())


def test_a_group_did_not_start_if_nothing_in_it_did() -> None:
    no, maybe = Unreachable(node="bob"), PeerLost(node="bob")
    assert did_not_start(ExceptionGroup("", [no, ExceptionGroup("", [no])]))
    assert not did_not_start(ExceptionGroup("", [no, ExceptionGroup("", [maybe, no])]))
