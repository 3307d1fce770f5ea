"""Names: a node's id is its public key, which proves who it is and says nothing to people."""

from meshkit import Runtime


def name_of(rt: Runtime, node: str) -> str:
    """Return what a node calls itself; the beginning of its id where it has not been heard of for a while."""
    peer = rt.peers.get(node)
    return rt.name if node == rt.node else peer.name if peer else f"{node[:8]}..."
