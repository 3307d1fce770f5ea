"""Notes on errors: what a guard adds to an error of somebody else that it passes on.

>>> error = ValueError("wrong")
>>> put(error, "retrier: gave up after ", "2 attempts")
>>> put(error, "retrier: gave up after ", "4 attempts")
>>> error.__notes__
['retrier: gave up after 4 attempts']
"""

import contextlib


def put(error: BaseException, start: str, rest: str) -> None:
    """Add the note `start + rest` to `error`, in place of one that starts the same.

    So notes do not pile up where one object is raised again and again. An exception that lets nothing be added to it
    (a frozen dataclass, say) goes without.
    """
    with contextlib.suppress(Exception):
        others = [note for note in getattr(error, "__notes__", ()) if not note.startswith(start)]
        error.__notes__ = [*others, start + rest]
