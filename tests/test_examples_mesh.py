"""The example mesh on virtual time: that its story ends well, and that it says so when it does not."""

from collections.abc import AsyncIterator

import pytest

from examples.mesh.__main__ import main, make_nodes
from examples.mesh.checkpoint import Checkpoint
from examples.mesh.stash import RECALL, Part, Recall, Stash
from meshkit import Message, handles
from meshkit.testing import run


async def file(size: int) -> AsyncIterator[bytes]:
    for start in range(0, size, 50_000):
        yield bytes(min(50_000, size - start))


@pytest.mark.parametrize("count", [3, 4, 5, 12])
@pytest.mark.parametrize("size", [0, 1, 200_000])
def test_the_file_comes_back_and_the_mesh_heals(count: int, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: main(make_nodes(count), "file", file(size)))
    out = capsys.readouterr().out
    assert "carol, dave, and erin teased bob" in out or count < 5
    assert "breaker of bob: closed -> open" in out
    assert ("alice entrusted erin" in out) is (count > 4)
    assert "NO" not in out.split("summary")[1]


class Forger(Stash):
    """Gives back what it was not given."""

    @handles(RECALL)
    async def give_back(self, msg: Message[Recall]) -> Part:
        part = self.kept[msg.sender][msg.payload.number]
        return Part(part.number, part.of, part.sealed[:-1] + bytes([part.sealed[-1] ^ 1]))


class Forgetful(Stash):
    """Says that it has nothing."""

    @handles(RECALL)
    async def give_back(self, msg: Message[Recall]) -> Part:
        self.kept.clear()
        return await super().give_back(msg)


@pytest.mark.parametrize(("liar", "says"), [(Forger, "BadSeal"), (Forgetful, "not_found")])
def test_a_confidant_that_does_not_give_the_file_back_is_named(
    liar: type[Stash], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = make_nodes(5)
    nodes[2].stash = liar(nodes[2].identity)
    assert not run(lambda: main(nodes, "file", file(1)))
    summary = capsys.readouterr().out.split("summary")[1]
    assert says in next(line for line in summary.splitlines() if line.startswith("after, from carol"))
    assert "byte for byte: NO" in summary


def test_a_decision_that_the_outlier_has_swayed_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = make_nodes(5)
    for node in nodes[1:]:
        node.checkpoint = Checkpoint(off_by=1000)
    assert not run(lambda: main(nodes, "file", file(1)))
    assert "despite the outlier: NO" in capsys.readouterr().out
