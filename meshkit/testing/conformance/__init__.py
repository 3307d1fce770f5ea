"""The conformance suite of transports: what a runtime relies on, as tests that any transport can be put to.

Subclass `TransportConformance` in a test file, say how a node gets its transport, and declare what it guarantees;
pytest and unittest find the tests in it. They are plain methods, each with an event loop of its own.

>>> from meshkit.testing import TransportConformance
>>> from meshkit.transports import MemoryHub, MemoryTransport
>>> class TestMemory(TransportConformance[MemoryTransport]):
...     def transport(self, others):
...         self.hub = self.hub if others else MemoryHub()
...         return MemoryTransport(self.hub)
>>> TestMemory().test_a_frame_arrives_where_it_is_sent_and_nowhere_else()

A failure names the promise that was broken. What is not guaranteed is not tested: such a test is skipped.
"""

from meshkit.testing.conformance._calls import CallsTests
from meshkit.testing.conformance._frames import FramesTests
from meshkit.testing.conformance._life import LifeTests
from meshkit.testing.conformance._mesh import T

__all__ = ["TransportConformance"]


class TransportConformance(FramesTests[T], LifeTests[T], CallsTests[T]):
    """The tests of a transport: a subclass must have `transport`, and may override the rest.

    `transport(others)` returns the transport of one more node of a mesh, not started. `others` are those of the other
    nodes, which are: none for the first node, which may then begin another mesh.

    `address(transport)` returns the host and the port at which strangers can connect to a started transport, by TCP;
    they then send it garbage, or nothing at all. By default there is none.

    What it guarantees:

        ordered         (True) frames from one node to another arrive in order, or not at all
        lossless        (True) every frame that was accepted arrives, while both nodes are up
        notices_loss    (True) the others are told when a node has closed its transport
        authenticated   (False) only nodes that are trusted get in, and each only under its own name
        max_frame       (None: not tested) bytes that a frame may have; a larger one is a `ValueError`
        max_buffer      (None: not tested) bytes that may wait for one node; beyond, a frame is `Overloaded`

    How it is tested:

        real_time       (False) on an ordinary event loop; else on virtual time
        patience        (10.0) seconds within which what is promised must have happened
        settle          (0.1) seconds after which what must not come would have come
    """
