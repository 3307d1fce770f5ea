"""What a computer of a simulation keeps when it is off."""

import copy
import errno
import random
from collections.abc import Iterator, MutableMapping
from typing import Any

__all__ = ["SimStore"]

_GONE = object()  # stands for what was deleted


class SimStore(MutableMapping[str, Any]):
    """The disk of one computer: a mapping whose values are copied on the way in and on the way out.

    What was written before `sync()` is there after a crash. Of what was written since, each key by itself is there or
    as it was before: the seed decides. After a crash, whoever still uses it from before gets an `OSError`.
    """

    def __init__(self, disk: dict[str, Any]) -> None:
        self._disk = disk
        self._written: dict[str, Any] = {}
        self._closed = False

    def __repr__(self) -> str:
        return f"SimStore({len(self._keys())} keys, {len(self._written)} not synced)"

    def sync(self) -> None:
        """Make what was written so far survive a crash."""
        self._require_power()
        self._flush()

    def __getitem__(self, key: str) -> Any:
        self._require_power()
        value = self._written.get(key, self._disk.get(key, _GONE))
        if value is _GONE:
            raise KeyError(key)
        return copy.deepcopy(value)

    def __setitem__(self, key: str, value: Any) -> None:
        self._require_power()
        self._written[key] = copy.deepcopy(value)

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self._written[key] = _GONE

    def __iter__(self) -> Iterator[str]:
        self._require_power()
        return iter(self._keys())

    def __len__(self) -> int:
        self._require_power()
        return len(self._keys())

    def _keys(self) -> list[str]:
        return [key for key in {**self._disk, **self._written} if self._written.get(key) is not _GONE]

    def _require_power(self) -> None:
        if self._closed:
            raise OSError(errno.EIO, "the computer has stopped")

    def _flush(self) -> None:
        for key, value in self._written.items():
            if value is _GONE:
                self._disk.pop(key, None)
            else:
                self._disk[key] = value
        self._written.clear()

    # --- for the computer

    def close(self) -> None:
        """Stop in good order: all that was written is kept."""
        self._flush()
        self._closed = True

    def crash(self, rng: random.Random) -> None:
        """Stop at once: of what was not synced, anything may be kept."""
        self._written = {key: value for key, value in self._written.items() if rng.random() < 0.5}
        self.close()
