"""Answers: what requests were answered, kept for a while.

A request that comes again (its caller got no answer, and tries again with the same id) is not handled again.

>>> from msgspec import Raw
>>> answers = Answers(ttl=60.0)
>>> answers.keep("alice", Reply("5f", Raw(b"42")), now=0.0)
>>> bytes(answers.get("alice", "5f", now=59.0).payload), answers.get("alice", "5f", now=60.0)
(b'42', None)
"""

from collections import OrderedDict

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
        self._answers: OrderedDict[tuple[str, str], tuple[float, Reply | Failure]] = OrderedDict()  # the oldest first
        self._sizes: OrderedDict[tuple[str, str], int] = OrderedDict()  # of those that are kept whole
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._answers)

    def keep(self, caller: str, answer: Reply | Failure, now: float) -> None:
        """Remember the answer to a request. Cost: amortised O(1)."""
        key = (caller, answer.id)
        self._forget(key)  # an older answer to the same request, which has expired
        self._answers[key] = (now + self._ttl, answer)
        self._sizes[key] = size = len(answer.payload) if isinstance(answer, Reply) else len(answer.detail)
        self._bytes += size
        while self._bytes > self._max_bytes:
            self._let_go()
        for _ in range(2):  # two, so that no more are kept than come in a `ttl`
            oldest = next(iter(self._answers))
            if self._answers[oldest][0] > now and len(self._answers) <= self._max_answers:
                break
            self._forget(oldest)

    def get(self, caller: str, call_id: str, now: float) -> Reply | Failure | None:
        """Return the answer that was given to a request, or None if none is remembered."""
        kept = self._answers.get((caller, call_id))
        return None if kept is None or kept[0] <= now else kept[1]

    def _forget(self, key: tuple[str, str]) -> None:
        self._answers.pop(key, None)
        self._bytes -= self._sizes.pop(key, 0)

    def _let_go(self) -> None:
        """Keep of the oldest answer that is kept whole only that there was one."""
        key, size = self._sizes.popitem(last=False)
        self._bytes -= size
        self._answers[key] = (self._answers[key][0], Failure(key[1], "failed", code="reply_forgotten"))
