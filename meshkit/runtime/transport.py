"""What a runtime needs of a transport, and what a transport needs of a runtime."""

import sys
from collections.abc import Collection, Mapping
from typing import Protocol

from meshkit.errors import Overloaded, Unreachable
from meshkit.runtime.frame import Prover

__all__ = ["Alone", "Receiver", "Transport"]


class Receiver(Protocol):
    """The runtime, as its transport sees it. The methods return at once, and never raise."""

    def received(self, sender: str, frame: bytes) -> None:
        """Take `frame`, which `sender` sent. If it is proved, the proof says who did, and not the transport."""
        ...

    def found(self, node: str) -> None:
        """Take note that `node` can be reached now. Only a transport that connects after its start tells."""
        ...

    def lost(self, node: str) -> None:
        """Take note that `node` is gone, and that what it was asked will not be answered."""
        ...


class Transport(Protocol):
    """Carries frames from node to node. Frames from one node to another arrive in order or not at all.

    `send` and `broadcast` never wait: what cannot be carried at once is buffered, within a limit of the transport's.
    """

    @property
    def in_process(self) -> bool:
        """Whether no frame leaves this process, so that none has to be proved."""
        ...

    @property
    def exposed(self) -> bool:
        """Whether strangers may reach it, so that the runtime must be told whom to trust."""
        ...

    @property
    def max_frame(self) -> int:
        """The largest frame that it carries, in bytes. A runtime hands over no larger one; it needs at least 32 KiB."""
        ...

    async def start(self, node: str, receiver: Receiver, prover: Prover | None) -> None:
        """Join the mesh as `node`, and hand what arrives to `receiver`. If this raises, nothing is left behind.

        Where connections are made, `prover.identity` proves who is at this end, and `prover.trusts` says whom to let
        in. It is None in a node without an identity, which there is only where the transport is `in_process`.
        """
        ...

    @property
    def peers(self) -> Collection[str]:
        """The other nodes that can be reached now."""
        ...

    def send(self, to: str, frame: bytes) -> None:
        """Send `frame` to the node `to`.

        Raises:
            Unreachable: There is no way to it.
            Overloaded: As many frames wait for it as may.
        """
        ...

    def broadcast(self, frame: bytes) -> Mapping[str, Overloaded] | None:
        """Send `frame` to every other node; return those that miss it, if any, since what waits for them is full.

        Raises:
            Overloaded: What waits for all of them is full.
        """
        ...

    async def close(self) -> None:
        """Leave the mesh. Nothing is received any more; closing twice is harmless."""
        ...


class Alone:
    """The transport of a node without one: there is nobody else."""

    in_process = True
    exposed = False
    max_frame = sys.maxsize
    peers: Collection[str] = ()

    async def start(self, node: str, receiver: Receiver, prover: Prover | None) -> None:
        """Do nothing: there is nothing to join."""

    def send(self, to: str, frame: bytes) -> None:
        """Refuse: there is nobody to send to."""
        raise Unreachable(node=to, reason="this runtime was given no transport")

    def broadcast(self, frame: bytes) -> None:
        """Send to nobody."""

    async def close(self) -> None:
        """Do nothing."""
