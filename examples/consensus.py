"""Nodes report how often a peer has restarted; one value comes out, though one of them lies and one corrects itself."""

import asyncio

from meshkit import ConsensusHelper, NoQuorum, UnknownVoter, majority, trimmed_mean

NODES = ["alice", "bob", "carol", "dave", "mallory"]
restarts = ConsensusHelper[int](4, trimmed_mean, NODES, name="restarts")
leader = ConsensusHelper[str](3, majority, NODES, name="leader")


async def report(after: float, voter: str, value: int) -> None:
    await asyncio.sleep(after)
    try:
        restarts.add_vote(voter, value)
    except (UnknownVoter, ValueError) as error:
        print("refused:", error)


async def main() -> None:
    async with asyncio.TaskGroup() as group:
        votes = [("alice", 41), ("eve", 7), ("mallory", 10**9), ("bob", 40), ("bob", 42), ("carol", 43)]
        for place, (voter, value) in enumerate(votes):
            group.create_task(report(place / 100, voter, value))
        await restarts.wait()  # for four different voters
        outcome = restarts.outcome()
    print(f"{outcome.value} restarts, say {len(outcome.voters)}; not counted: {', '.join(map(str, outcome.trimmed))}")

    for voter, candidate in [("alice", "bob"), ("bob", "bob"), ("carol", "carol"), ("dave", "carol")]:
        leader.add_vote(voter, candidate)
    try:
        print("leader:", leader.result())
    except NoQuorum as error:
        print(error)


if __name__ == "__main__":
    asyncio.run(main())
