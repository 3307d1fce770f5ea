"""What meshkit is tested with, for your own tests: virtual time, seeds, cancellation, one node, bad networks."""

from typing import TYPE_CHECKING

from meshkit._lazy import lazily

if TYPE_CHECKING:
    from meshkit.testing.cancellation import (
        CancellationPoint as CancellationPoint,
        cancellation_points as cancellation_points,
    )
    from meshkit.testing.chaos_proxy import ChaosProxy as ChaosProxy
    from meshkit.testing.conformance import TransportConformance as TransportConformance
    from meshkit.testing.sim_cluster import (
        Crashed as Crashed,
        SimCluster as SimCluster,
        SimNode as SimNode,
        SimStore as SimStore,
    )
    from meshkit.testing.sim_loop import Machine as Machine, SimLoop as SimLoop
    from meshkit.testing.sim_network import (
        Link as Link,
        Nodes as Nodes,
        Rule as Rule,
        SimNetwork as SimNetwork,
        SimTransport as SimTransport,
        Verdict as Verdict,
    )
    from meshkit.testing.simulation import simulate as simulate, simulated as simulated
    from meshkit.testing.single_node import (
        SILENCE as SILENCE,
        Sent as Sent,
        Silence as Silence,
        TestRuntime as TestRuntime,
    )
    from meshkit.testing.virtual_time import (
        Deadlock as Deadlock,
        Leak as Leak,
        Livelock as Livelock,
        VirtualTimeLoop as VirtualTimeLoop,
        run as run,
    )
else:  # hidden from type checkers, to whom a __getattr__ would mean that every name exists
    __getattr__, __all__ = lazily(
        __name__,
        {
            "cancellation": ["CancellationPoint", "cancellation_points"],
            "chaos_proxy": ["ChaosProxy"],
            "conformance": ["TransportConformance"],
            "sim_cluster": ["Crashed", "SimCluster", "SimNode", "SimStore"],
            "sim_loop": ["Machine", "SimLoop"],
            "sim_network": ["Link", "Nodes", "Rule", "SimNetwork", "SimTransport", "Verdict"],
            "simulation": ["simulate", "simulated"],
            "single_node": ["SILENCE", "Sent", "Silence", "TestRuntime"],
            "virtual_time": ["Deadlock", "Leak", "Livelock", "VirtualTimeLoop", "run"],
        },
    )
