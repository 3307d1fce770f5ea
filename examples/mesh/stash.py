"""Stash: a node seals a file and leaves it with three confidants, who give it back when the node has lost its memory.

The parts of the file are sealed with a key that only the owner has, so a confidant holds bytes that mean nothing to it.
A confidant that goes silent is replaced: its breaker opens, and the file is entrusted to somebody else.
"""

from collections.abc import AsyncIterable, AsyncIterator, Iterable

import anyio
import msgspec

from examples.mesh.names import name_of
from meshkit import (
    CallTimeout,
    CircuitBreaker,
    CircuitChanged,
    Event,
    Identity,
    MeshkitError,
    Message,
    OutcomeUnknown,
    Overloaded,
    PerKey,
    RateLimited,
    RateLimiter,
    Reject,
    RemoteError,
    Retrier,
    RetryPolicy,
    Service,
    State,
    Unreachable,
    handles,
    request,
    stack,
)


class Part(msgspec.Struct, frozen=True):
    """One sealed piece of a stash, number `number` of `of`."""

    number: int
    of: int
    sealed: bytes


class Recall(msgspec.Struct, frozen=True):
    """Asks for one part of what the sender once left here."""

    number: int


STORE = request("stash:store", Part, reply=int)  # the reply: how many parts of the sender are here now
CHECK = request("stash:check", int, reply=bool)  # are there so many parts of the sender here?
RECALL = request("stash:recall", Recall, reply=Part)


PATIENCE = 2.0
"""Seconds for one part: longer than the window of a confidant's limiter, in which its owner may have to wait."""
MOST_PARTS = 1_000
"""Of one file, which is the only one that an owner may leave here."""
MOST_BYTES = MOST_PARTS * 64 * 1024


def is_passing(error: Exception) -> bool:
    """Say what is worth another try with the same peer: no answer, too busy, or its plea for patience."""
    return isinstance(error, OutcomeUnknown | Overloaded) or (isinstance(error, RemoteError) and error.retryable)


class Stash(Service):
    """Keeps this node's file with confidants, and keeps what others entrust to it."""

    name, emoji = "stash", "📦"
    wanted = 3

    def __init__(self, identity: Identity) -> None:
        self.encryptor = identity.shared_with(identity.node_id, "examples.mesh stash")  # shared with nobody but itself
        self.kept: dict[str, dict[int, Part]] = {}  # what others left here, by owner
        self.mine: list[Part] = []
        self.confidants: set[str] = set()
        self.finding = anyio.Lock()
        self.storing = RateLimiter(max_count=200, window=1.0, name="parts per owner")
        self.recalling = RateLimiter(max_count=200, window=1.0, name="recalls per owner")
        self.breakers: PerKey[str, CircuitBreaker] = PerKey(
            lambda peer: CircuitBreaker(
                failure_threshold=2,
                reset_timeout=5.0,
                trips_on=(OutcomeUnknown, Unreachable),
                name=f"breaker of {name_of(self.rt, peer)}",
                observer=self.tell,
            )
        )
        patience = RetryPolicy(max_retries=3, base_delay=0.2, max_delay=1.0)
        self.retrier = Retrier(patience, on=is_passing, idempotent=True)  # to store a part twice is harmless

    async def start(self) -> None:
        """Look after the confidants for as long as this node is up."""
        self.spawn(self.tend)

    def tell(self, event: Event) -> None:
        """Log what happens to a breaker."""
        if isinstance(event, CircuitChanged):
            self.log.warning("%s: %s -> %s", event.name, event.before, event.after)

    # --- as an owner -------------------------------------------------------------------------------------

    async def put(self, chunks: AsyncIterable[bytes] | Iterable[bytes]) -> None:
        """Seal a file and leave it with confidants."""
        sealed = [part async for part in self.encryptor.seal_stream(chunks)]
        if len(sealed) > MOST_PARTS:
            raise ValueError(f"the file is too large: a stash takes {MOST_PARTS} parts of 64 KiB")
        async with self.finding:
            self.mine = [Part(number, len(sealed), part) for number, part in enumerate(sealed)]
            self.confidants = set()  # those of an earlier file have that one
        await self.find_confidants()

    async def find_confidants(self) -> None:
        """Entrust the file to as many peers as are wanted, or as there are that answer."""
        async with self.finding:  # one search at a time, or a peer would be given everything twice
            for peer, known in sorted(self.rt.peers.items(), key=lambda item: item[1].name):
                if len(self.confidants) >= self.wanted:
                    return
                if peer in self.confidants or self.breakers[peer].state is not State.CLOSED:
                    continue
                if await self.entrust(peer):
                    self.confidants.add(peer)
                    parts = f"{len(self.mine)} part{'s' if len(self.mine) > 1 else ''}"
                    self.log.event("entrust", self.rt.name, target=known.name, message=parts)

    async def entrust(self, peer: str) -> bool:
        """Leave every part with `peer`; return whether it has them all now."""
        try:
            for part in self.mine:
                await self.ask(peer, part)
        except MeshkitError as error:
            self.log.warning("cannot leave it with %s", name_of(self.rt, peer), reason=str(error))
            return False
        return True

    async def ask(self, peer: str, part: Part) -> None:
        """Call STORE, retried, and through the breaker of this peer: each try counts there."""
        guard = stack(self.retrier, self.breakers[peer])
        await guard.call(self.rt.call, STORE, part, to=peer, timeout=PATIENCE)

    async def tend(self) -> None:
        """Ask the confidants now and then whether they still have it; replace the one whose breaker has opened."""
        while True:
            await anyio.sleep(0.5)
            for peer in sorted(self.confidants):
                breaker = self.breakers[peer]
                try:
                    if not await breaker.call(self.rt.call, CHECK, len(self.mine), to=peer, timeout=0.5):
                        self.confidants.discard(peer)
                except CallTimeout:
                    self.log.warning("no answer from %s", name_of(self.rt, peer))
                except MeshkitError as error:
                    self.confidants.discard(peer)
                    self.log.warning("%s is no longer a confidant", name_of(self.rt, peer), reason=str(error))
            if self.mine and len(self.confidants) < self.wanted:
                await self.find_confidants()

    def lose_memory(self) -> None:
        """Forget everything but the keys."""
        self.kept, self.mine, self.confidants = {}, [], set()

    async def who_has_it(self) -> list[str]:
        """Ask every peer for the first part; return those that have it, and answer."""
        found = await self.rt.call_many(RECALL, Recall(0), to=self.rt.peers, timeout=1.0)
        return list(found.replies)

    async def recover(self, peer: str) -> bytes:
        """Get the file back from `peer` alone."""
        return b"".join([chunk async for chunk in self.encryptor.open_stream(self.recall(peer))])

    async def recall(self, peer: str) -> AsyncIterator[bytes]:
        """Yield the sealed parts that `peer` keeps for this node, in order."""
        number, of = 0, 1
        while number < of:
            part = await self.retrier.call(self.rt.call, RECALL, Recall(number), to=peer, timeout=PATIENCE)
            number, of = number + 1, part.of
            yield part.sealed

    # --- as a confidant ----------------------------------------------------------------------------------

    async def take_turn(self, limiter: RateLimiter, owner: str) -> None:
        """Wait until `limiter` lets `owner` in; if that comes after its call gives up, ask it to come back later."""
        try:
            await limiter.acquire(owner)
        except RateLimited as limited:
            raise Reject("slow_down", str(limited), retryable=True) from limited

    @handles(STORE)
    async def store(self, msg: Message[Part]) -> int:
        """Keep a part for its sender, within what one owner may ask for."""
        await self.take_turn(self.storing, msg.sender)
        if not 0 <= msg.payload.number < msg.payload.of <= MOST_PARTS:
            raise Reject("too_large", f"a file may have up to {MOST_PARTS} parts here")
        kept = self.kept.setdefault(msg.sender, {})
        if msg.payload.number == 0:
            kept.clear()  # it is another file from now on
        kept[msg.payload.number] = msg.payload
        self.log.event("store", name_of(self.rt, msg.sender), message=f"stored {len(msg.payload.sealed):,} bytes")
        return len(kept)

    @handles(CHECK)
    async def check(self, msg: Message[int]) -> bool:
        """Say whether every part is still here."""
        return len(self.kept.get(msg.sender, ())) == msg.payload

    @handles(RECALL)
    async def give_back(self, msg: Message[Recall]) -> Part:
        """Give a part back to whoever left it: nobody else can prove to be the sender."""
        await self.take_turn(self.recalling, msg.sender)
        part = self.kept.get(msg.sender, {}).get(msg.payload.number)
        if part is None:
            raise Reject("not_found", f"no part {msg.payload.number} of yours is here")
        self.log.event("request", name_of(self.rt, msg.sender))
        return part
