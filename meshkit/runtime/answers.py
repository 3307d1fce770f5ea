"""Answers: what requests were answered, kept for a while.

A request that comes again (its caller got no answer, and tries again with the same id) is not handled again.
"""

from collections import OrderedDict, deque

from meshkit.runtime.wire import Failure, Reply

__all__ = ["Answers"]


class Answers:
    """The core: answers by caller and id, for `ttl` seconds.

    At most `max_answers` are remembered; then the oldest is forgotten before its time. Of their payloads no more than
    `max_bytes` are kept: of the older ones only that there was an answer.
    """

    def __init__(self, *, ttl: float = 60.0, max_answers: int = 100_000, max_bytes: int = 16 * 1024 * 1024) -> None:
        self._ttl = ttl
        self._max_answers = max_answers
        self._max_bytes = max_bytes
        self._bytes = 0
        self._answers: OrderedDict[tuple[str, str], tuple[float, Reply | Failure]] = OrderedDict()
        self._held: deque[tuple[tuple[str, str], int]] = deque()  # whose answers are kept whole, the oldest first

    def __len__(self) -> int:
        return len(self._answers)

    def keep(self, caller: str, answer: Reply | Failure, now: float) -> None:
        """Remember the answer to a request that was not answered before."""
        key = (caller, answer.id)
        size = len(answer.payload) if isinstance(answer, Reply) else 0
        self._answers[key] = (now + self._ttl, answer)
        self._bytes += size
        self._held.append((key, size))
        while self._bytes > self._max_bytes:
            self._let_go()
        self._sweep(now)

    def get(self, caller: str, call_id: str, now: float) -> Reply | Failure | None:
        """Return the answer that was given to a request, or None if none is remembered."""
        kept = self._answers.get((caller, call_id))
        return None if kept is None or kept[0] <= now else kept[1]

    def _sweep(self, now: float) -> None:
        """Forget the oldest two that have expired, so that no more are kept than come in a `ttl`."""
        for _ in range(2):
            key, (expiry, _answer) = next(iter(self._answers.items()))
            if expiry > now and len(self._answers) <= self._max_answers:
                return
            if self._held and self._held[0][0] == key:
                self._bytes -= self._held.popleft()[1]
            del self._answers[key]
            if not self._answers:
                return

    def _let_go(self) -> None:
        """Keep no more of the oldest answer that is kept whole than that there was one."""
        key, size = self._held.popleft()
        self._bytes -= size
        expiry, answer = self._answers[key]
        self._answers[key] = (expiry, Failure(answer.id, "failed", code="reply_forgotten"))
