"""The books: what callers were told and what handlers did, kept outside of the nodes; and what must hold between them.

Nothing here knows how meshkit works, but for three numbers of it: how long a frame may take, by how much the stamp of a
frame may be older than a node, and how often a handler is tried again.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from meshkit import Draining, MeshkitError, NotAccepted, Overloaded, RemoteError, Runtime
from meshkit.testing import SimLoop
from meshkit.testing._sim_machine import Machine

TRANSIT = 0.6
"""Seconds that a frame takes at most, where nothing holds it up: eleven times 45 ms, and 50 ms in the outbox."""
SKEW = 3.0
"""Seconds by which a wall clock is wrong at most, in either direction."""
FORGOTTEN = 2.0 + 2 * SKEW + 1.0
"""Seconds: what was sent longer before a node started than that never runs there, though somebody sends it again."""
RETRIES = 2
"""How often a handler that may be called again is called again."""
MAILBOXES, CONCURRENT, PENDING = 20 + 5 + 2 + 2, 4 + 2 + 1, 3 * 50 + 50
"""How much of a node may wait (two that rest keep their place), run, and wait for others: three floods, and clients."""
CODES = {"tired", "nested"}
"""With which our handlers fail."""

Told = str | BaseException | None
"""A reply, an error, or nothing."""


class Work(msgspec.Struct, frozen=True):
    """What is asked of a node: the `attempt`-th time, by a caller who may not know that it was answered."""

    id: str
    attempt: int
    seconds: float
    then: str | None = None  # another node, that is asked meanwhile


@dataclass(eq=False)
class Run:
    """A handler, from its begin to its end."""

    work: Work
    node: str
    rt: Runtime
    machine: Machine
    begun: float
    ended: float = float("inf")
    effect: bool = False
    replayed: bool = False
    """Whether nobody has asked for it since the node started: a frame of before has come again."""

    @property
    def reply(self) -> str:
        """What the caller is told, which says whose reply it is."""
        return f"{self.work.id} {self.work.attempt} {self.node}"


@dataclass(eq=False)
class Attempt:
    """One time that work was asked for: of the node `to`, of any (None), or of several (`many`)."""

    number: int
    node: str
    to: str | None
    begun: float
    deadline: float
    many: bool = False
    told: dict[str | None, Told] = field(default_factory=dict[str | None, Told])
    """What came of it, by node (None: by any)."""


@dataclass(eq=False)
class Call:
    """What a caller wants done; `repeats` if under the id of the call, however often it is tried."""

    id: str
    flaky: bool = False
    repeats: bool = False
    attempts: list[Attempt] = field(default_factory=list[Attempt])
    runs: list[Run] = field(default_factory=list[Run])

    def work(self, seconds: float, then: str | None = None) -> Work:
        """Return what the present attempt asks for."""
        return Work(self.id, len(self.attempts), seconds, then)


@dataclass
class Stall:
    """A computer (or the links from one to another) stood still."""

    what: set[str | tuple[str, str]]
    begun: float
    ended: float = float("inf")


class World:
    """Whoever finds that something is not as it must be says so with `check`."""

    def __init__(self, sim: SimLoop) -> None:
        self.sim = sim
        self.calls: dict[str, Call] = {}
        self.news: set[str] = set()  # all that was ever said
        self.heard: Counter[tuple[str, Runtime]] = Counter()
        self.notes: Counter[Runtime] = Counter()  # that wait or are being handled
        self.running: dict[Run, Call] = {}
        self.born: dict[Runtime, float] = {}
        self.names: dict[str, str] = {}  # of nodes, by id
        self.happened: Counter[str] = Counter()
        self._stalls: list[Stall] = []
        self._wrong: list[str] = []

    def check(self, holds: object, text: str) -> None:
        """Take note of what is wrong; it is raised by whoever looks next: a handler's own error would be hidden."""
        if not holds:
            self._wrong.append(f"at {self.sim.now:.3f} s: {text}")

    # --- what stands still

    @contextmanager
    def stalled(self, what: Iterable[str | tuple[str, str]]) -> Iterator[None]:
        """Meanwhile, computers (or links) stand still."""
        stall = Stall({*what}, self.sim.now)
        self._stalls.append(stall)
        try:
            yield
        finally:
            stall.ended = self.sim.now

    def stall(self, since: float, *what: str | tuple[str, str]) -> float:
        """Return for how long any of these stood still since then, at most."""
        hit = [stall for stall in self._stalls if stall.what.intersection(what)]
        return sum(max(0.0, min(stall.ended, self.sim.now) - max(stall.begun, since)) for stall in hit)

    # --- callers

    def call(self, *, flaky: bool = False, repeats: bool = False) -> Call:
        call = self.calls[f"c{len(self.calls)}"] = Call(f"c{len(self.calls)}", flaky, repeats)
        return call

    def attempt(self, call: Call, node: str, to: str | None, deadline: float, *, many: bool = False) -> Attempt:
        attempt = Attempt(len(call.attempts) + 1, node, to, self.sim.now, deadline, many)
        call.attempts.append(attempt)
        return attempt

    def tell(self, call: Call, attempt: Attempt, of: str | None, told: Told) -> None:
        """A caller is told what came of it; what was refused has not been done, and is not being done."""
        self.check(of not in attempt.told, f"{call.id} has two outcomes: {attempt}")
        attempt.told[of] = told
        took = self.sim.now - attempt.begun - self.stall(attempt.begun, attempt.node)
        had = attempt.deadline - attempt.begun
        self.check(took <= had + slack(had), f"{call.id} took {took:.3f} s, and had {had:.3f} s")
        if isinstance(told, BaseException):
            code = f" {told.code}" if isinstance(told, RemoteError) else ""
            self.happened[f"told {type(told).__name__}{code} ({getattr(told, 'executed', 'nothing')})"] += 1
            if call.repeats and isinstance(told, Draining | NotAccepted | Overloaded):  # the others have not been there
                before = [run for run in call.runs if run.node == of and run.begun < attempt.begun]
                alive = [run for run in before if self.life(run.node) is run.rt]
                known = [run for run in alive if run.effect or run.ended > self.sim.now]
                self.check(not known, f"{call.id} was asked again and refused ({told!r}), but has begun: {known}")
        else:
            self.happened["told a reply"] += 1

    def life(self, node: str) -> Runtime | None:
        """Return the last runtime that a node had."""
        return next((rt for rt in reversed(self.born) if rt.name == node), None)

    # --- handlers

    def latest(self, call: Call, run: Run) -> float:
        """Return when `run` must have ended: when its last caller gives up, and that is known to the node."""
        latest = math.inf if run.replayed else 0.0
        for attempt in call.attempts:
            late = self.stall(attempt.begun, attempt.node, run.node, (attempt.node, run.node))
            latest = max(latest, attempt.deadline + slack(attempt.deadline - attempt.begun) + TRANSIT + late)
        return latest

    def begin(self, work: Work, rt: Runtime, machine: Machine, deadline: float) -> Run:
        """A handler begins, for which its node has set a deadline."""
        call, now = self.calls[work.id], self.sim.now
        run = Run(work, rt.name, rt, machine, now)
        age = self.born[rt] - call.attempts[work.attempt - 1].begun
        run.replayed = age > 0
        if run.replayed:
            self.happened["ran in a life that began after it was asked for"] += 1
            self.check(age <= FORGOTTEN, f"{run} was sent {age:.3f} s before the life in which it runs")
        late = machine.moment(deadline) - self.latest(call, run)
        self.check(late <= 0, f"the deadline of {run} is {late:.3f} s after that of its caller and the transit")
        self.check(deadline > machine.local(now), f"{run} began after its deadline")
        call.runs.append(run)
        self.running[run] = call
        return run

    def effect(self, run: Run) -> None:
        run.effect = True
        again = [other for other in self.running[run].runs if other.effect and other.rt is run.rt]
        self.check(len(again) == 1, f"took effect more than once on one node: {again}")

    def end(self, run: Run) -> None:
        run.ended = self.sim.now
        del self.running[run]

    # --- at any time

    def look(self) -> None:
        """Check what must hold at any time."""
        for rt in self.born:
            stats = rt.stats()
            ended = stats.handled + stats.failed + stats.cancelled + stats.cut
            self.check(stats.delivered == ended + stats.queued + stats.running, f"books of {rt}: {stats}")
            self.check(stats.queued <= MAILBOXES and stats.running <= CONCURRENT, f"bounds of {rt}: {stats}")
            self.check(stats.pending <= PENDING, f"calls of {rt}: {stats}")
        for run, call in self.running.items():
            late = self.sim.now - self.latest(call, run) - self.stall(run.begun, run.node)
            self.check(late <= 0, f"{run} goes on {late:.3f} s after its caller has given up")
        if self._wrong:
            raise AssertionError("\n".join(self._wrong[:20]))

    # --- when all has ended

    def settle(self) -> None:
        """Check that what callers were told is what happened, and that nothing is left."""
        for call in self.calls.values():
            for attempt in call.attempts:
                own = [run for run in call.runs if run.work.attempt == attempt.number and not run.replayed]
                self.check(attempt.told, f"{call.id} has no outcome: {attempt}")
                for of, told in attempt.told.items():
                    self._check_told(call, of, told, [run for run in own if of in {None, run.node}])
                self._check_runs(call, attempt, own)
        self.check(not self.running, f"these still run: {self.running}")
        for rt in self.born:
            stats = rt.stats()
            self.check(not stats.queued + stats.running + stats.pending, f"left on {rt}: {stats}")
            for what in ("handled", "failed", "retried", "cancelled", "cut"):
                self.happened[f"messages {what}"] += getattr(stats, what)
            for (kind, stage, reason), count in stats.dropped.items():
                self.happened[f"dropped {kind or 'frame'} at {stage}: {reason}"] += count
        self.look()

    def _check_told(self, call: Call, of: str | None, told: Told, own: list[Run]) -> None:
        if isinstance(told, str):
            done = {run for run in call.runs if run.effect and run.reply == told}
            lives = {run.rt for run in done}
            self.check(done and len(lives) == len(done), f"{call.id} got {told!r} for {done}")
            first = {run for run in done if not run.replayed}
            self.check(call.repeats or first <= {*own}, f"{call.id} got {told!r}, and asked for {own}")
            self.check(of in {None, *(run.node for run in done)}, f"{call.id} was asked of {of}, and got {told!r}")
        elif isinstance(told, RemoteError):
            failed = [run for run in call.runs if of in {None, run.node} and not run.effect]
            internal = call.flaky and told.code == "internal"
            self.check(failed and (told.code in CODES or internal), f"{call.id} failed with {told!r}: {failed}")
        elif refused(told):
            self.check(not own, f"{call.id} was refused ({told!r}), but began: {own}")

    def _check_runs(self, call: Call, attempt: Attempt, own: list[Run]) -> None:
        """What was sent once ran once."""
        runs = Counter(run.node for run in own)
        self.check(attempt.many or len(runs) <= 1, f"{call.id} ran on more than one node: {own}")
        # What comes again while its handler is being cancelled is handled again after that.
        often = 1 + RETRIES if call.flaky else len(call.attempts)
        self.check(max(runs.values(), default=0) <= often, f"{call.id} ran too often: {own}")


def refused(told: Told) -> bool:
    """Return whether a caller was told that it was not done."""
    return isinstance(told, MeshkitError) and told.executed == "no"


def slack(seconds: float) -> float:
    """Return by how much clocks that are one per cent off may differ about so many seconds."""
    return 0.05 + 0.03 * seconds
