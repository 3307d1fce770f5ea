"""Answers: what requests were answered, kept for a while.

A request that comes again (its caller got no answer, and tries again with the same id) is not handled again.

>>> from msgspec import Raw
>>> answers = Answers(ttl=60.0)
>>> answers.keep("alice", Reply("5f", Raw(b"42")), now=0.0)
>>> bytes(answers.get("alice", "5f", now=59.0).payload), answers.get("alice", "5f", now=60.0)
(b'42', None)
"""

from collections import deque

from meshkit.runtime.wire import Failure, Reply

__all__ = ["Answers"]


class Answers:
    """The core: answers by caller and id, for `ttl` seconds. `now` never goes back.

    At most `max_answers` are remembered; then the oldest is forgotten before its time. Of their payloads no more than
    `max_bytes` are kept: of the older ones only that there was an answer.
    """

    def __init__(self, *, ttl: float = 60.0, max_answers: int = 100_000, max_bytes: int = 16 * 1024 * 1024) -> None:
        self._ttl = ttl
        self._max_answers = max_answers
        self._max_bytes = max_bytes
        self._answers: dict[tuple[str, str], tuple[float, Reply | Failure]] = {}
        # Keys with when they expire, in order of arrival. What has been answered anew since is in there twice.
        self._by_age: deque[tuple[tuple[str, str], float]] = deque()
        self._whole: deque[tuple[tuple[str, str], float]] = deque()  # the end of it: those of which the payload is kept
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._answers)

    def keep(self, caller: str, answer: Reply | Failure, now: float) -> None:
        """Remember the answer to a request. Cost: amortised O(1)."""
        key, expires = (caller, answer.id), now + self._ttl
        before = self._answers.get(key)  # an older answer to the same request, which has expired
        if before is not None:
            self._bytes -= _size(before[1])
        self._answers[key] = (expires, answer)
        added = (key, expires)
        self._by_age.append(added)
        self._whole.append(added)
        self._bytes += _size(answer)
        while self._bytes > self._max_bytes:
            self._let_go()
        for _ in range(2):  # two, so that no more are kept than come in a `ttl`
            if self._by_age[0][1] > now and len(self._answers) <= self._max_answers:
                break
            self._forget_oldest()

    def get(self, caller: str, call_id: str, now: float) -> Reply | Failure | None:
        """Return the answer that was given to a request, or None if none is remembered."""
        kept = self._answers.get((caller, call_id))
        return None if kept is None or kept[0] <= now else kept[1]

    def _forget_oldest(self) -> None:
        oldest = self._by_age.popleft()
        if self._whole and self._whole[0] is oldest:
            self._whole.popleft()
        key, expires = oldest
        kept = self._answers.get(key)
        if kept is not None and kept[0] == expires:
            self._bytes -= _size(kept[1])
            del self._answers[key]

    def _let_go(self) -> None:
        """Keep of the oldest answer that is kept whole only that there was one."""
        key, expires = self._whole.popleft()
        kept = self._answers.get(key)
        if kept is not None and kept[0] == expires:
            self._bytes -= _size(kept[1])
            self._answers[key] = (expires, Failure(key[1], "failed", code="reply_forgotten"))


def _size(answer: Reply | Failure) -> int:
    return len(answer.payload) if isinstance(answer, Reply) else len(answer.detail)
