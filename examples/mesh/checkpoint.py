"""Checkpoint: every node says what it has observed of a subject; all decide the same, although one of them is wrong."""

import msgspec

from meshkit import ConsensusHelper, Message, Service, broadcast, handles, trimmed_mean


class Vote(msgspec.Struct, frozen=True):
    """What the sender has observed of `subject`."""

    subject: str
    restarts: int
    uptime: int


VOTE = broadcast("checkpoint:vote", Vote)


class Checkpoint(Service):
    """Collects votes about subjects, its own included, and decides when enough are in."""

    name, emoji = "checkpoint", "🏁"

    def __init__(self, voters: list[str], *, off_by: int = 1) -> None:
        self.voters = voters
        self.off_by = off_by  # how many times too high this node counts: 1 is right
        self.restarts: dict[str, ConsensusHelper[int]] = {}
        self.uptime: dict[str, ConsensusHelper[int]] = {}
        self.decided: dict[str, tuple[int, int]] = {}

    def helper(self, of: dict[str, ConsensusHelper[int]], subject: str) -> ConsensusHelper[int]:
        """Return what counts the votes about `subject`; a decision takes the votes of all who may vote."""
        if subject not in of:
            of[subject] = ConsensusHelper(threshold=len(self.voters), aggregator=trimmed_mean, voters=self.voters)
        return of[subject]

    async def observe(self, subject: str, restarts: int, uptime: int) -> None:
        """Tell every node what was seen here."""
        await self.rt.emit(VOTE, Vote(subject, restarts * self.off_by, uptime * self.off_by))

    @handles(VOTE)
    async def count(self, msg: Message[Vote]) -> None:
        """Add a vote, and decide once a quorum is there."""
        vote = msg.payload
        restarts, uptime = self.helper(self.restarts, vote.subject), self.helper(self.uptime, vote.subject)
        restarts.add_vote(msg.sender, vote.restarts)
        uptime.add_vote(msg.sender, vote.uptime)
        if restarts.has_quorum and vote.subject not in self.decided:
            self.decided[vote.subject] = (restarts.result(), uptime.result())
            outcome = restarts.outcome()
            self.log.info("%s restarted %s times", vote.subject, outcome.value, not_counted=list(outcome.trimmed))
