"""What meshkit is tested with, for your own tests: virtual time and cancellation at every await."""

from typing import TYPE_CHECKING

from meshkit._lazy import lazily

if TYPE_CHECKING:
    from meshkit.testing.cancellation import CancellationPoint as CancellationPoint
    from meshkit.testing.cancellation import cancellation_points as cancellation_points
    from meshkit.testing.virtual_time import Deadlock as Deadlock
    from meshkit.testing.virtual_time import Leak as Leak
    from meshkit.testing.virtual_time import Livelock as Livelock
    from meshkit.testing.virtual_time import VirtualTimeLoop as VirtualTimeLoop
    from meshkit.testing.virtual_time import run as run

__getattr__, __all__ = lazily(
    __name__,
    {
        "cancellation": ["CancellationPoint", "cancellation_points"],
        "virtual_time": ["Deadlock", "Leak", "Livelock", "VirtualTimeLoop", "run"],
    },
)
