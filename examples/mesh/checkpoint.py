"""Checkpoint: every node says what it has observed of a subject; all decide the same, although one of them is wrong."""

import msgspec

from examples.mesh.names import name_of
from meshkit import ConsensusHelper, Message, Reject, Service, handles, request, trimmed_mean


class Vote(msgspec.Struct, frozen=True):
    """What a node has observed of a subject."""

    restarts: int
    uptime: int


VOTE = request("checkpoint:vote", str, reply=Vote)  # what have you observed of this node?


class Checkpoint(Service):
    """Votes about nodes when it is asked, and decides by the votes of all."""

    name, emoji = "checkpoint", "🏁"

    def __init__(self, *, off_by: int = 1) -> None:
        self.off_by = off_by  # how many times too high this node counts: 1 is right
        self.observed: dict[str, Vote] = {}
        self.decided: dict[str, tuple[int, int]] = {}

    def observe(self, subject: str, restarts: int, uptime: int) -> None:
        """Remember what was seen here."""
        self.observed[subject] = Vote(restarts * self.off_by, uptime * self.off_by)

    @handles(VOTE)
    async def vote(self, msg: Message[str]) -> Vote:
        """Say what was seen here."""
        if msg.payload not in self.observed:
            raise Reject("not_observed")
        return self.observed[msg.payload]

    async def decide(self, subject: str) -> None:
        """Ask every node for its vote, this one included; decide, if more than half have one."""
        votes = await self.rt.call_many(VOTE, subject, timeout=1.0)
        quorum = (len(votes.replies) + len(votes.errors)) // 2 + 1
        restarts: ConsensusHelper[int] = ConsensusHelper(threshold=quorum, aggregator=trimmed_mean)
        uptime: ConsensusHelper[int] = ConsensusHelper(threshold=quorum, aggregator=trimmed_mean)
        for voter, vote in votes.replies.items():
            restarts.add_vote(voter, vote.restarts)
            uptime.add_vote(voter, vote.uptime)
        if restarts.has_quorum:
            self.decided[subject] = (restarts.result(), uptime.result())
            outcome = restarts.outcome()
            not_counted = [name_of(self.rt, voter) for voter in votes.replies if voter in outcome.trimmed]
            self.log.info("%s restarted %s times", name_of(self.rt, subject), outcome.value, not_counted=not_counted)
