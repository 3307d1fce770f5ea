"""One guard out of many: try again, but not who keeps failing, not too many at once, and not for too long."""

import asyncio

from meshkit import Bulkhead, CircuitBreaker, CircuitOpen, Retrier, RetryPolicy, Timeout, stack

guards = stack(
    Retrier(RetryPolicy(max_retries=3, base_delay=0.01), on=(ConnectionError, CircuitOpen), name="retrier"),
    CircuitBreaker(failure_threshold=2, reset_timeout=0.1, name="bob"),
    Bulkhead(max_concurrent=10, name="bob"),
    Timeout(0.5, name="bob"),
)
attempts = 0


@guards
async def ask(question: str) -> str:
    global attempts  # noqa: PLW0603 - it stands for a peer that has a bad start
    attempts += 1
    if attempts < 3:
        raise ConnectionError(f"attempt {attempts}: bob does not answer")
    return f"{question} Fine, at attempt {attempts}."


async def main() -> None:
    print(guards.describe())
    print(await ask("How are you?"))  # the third attempt waited until the breaker let a probe through
    try:
        stack(Bulkhead(max_concurrent=10), guards)
    except ValueError as error:
        print(error)


if __name__ == "__main__":
    asyncio.run(main())
