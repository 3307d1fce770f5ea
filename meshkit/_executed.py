"""Whether an error says that the work did not start: of several errors, one that does not say so tells more.

>>> from meshkit.errors import PeerLost, Unreachable
>>> did_not_start(Unreachable(node="bob")), did_not_start(PeerLost(node="bob")), did_not_start(OSError())
(True, False, False)
"""

from typing import Any, cast

from meshkit.errors import MeshkitError


def did_not_start(error: Exception) -> bool:
    """Return whether `error` says that the work did not start; a group says it if all errors in it do."""
    if isinstance(error, ExceptionGroup):
        members: tuple[Exception, ...] = cast("Any", error).exceptions
        return all(map(did_not_start, members))
    return isinstance(error, MeshkitError) and error.executed == "no"
