"""meshkit: cancellation-exact service utilities for asyncio, and a small runtime they plug into.

Every public name can be imported from here, and is loaded from its module when it is first used: importing one utility
loads neither the others nor what they depend on. docs/utilities says which utility to use when.
"""

from typing import TYPE_CHECKING

from meshkit._lazy import lazily

if TYPE_CHECKING:
    from meshkit.batch import (
        Batch as Batch,
        BatchCollector as BatchCollector,
        BatchDone as BatchDone,
        BatchStats as BatchStats,
        Taken as Taken,
    )
    from meshkit.bulkhead import (
        Bulkhead as Bulkhead,
        BulkheadRefused as BulkheadRefused,
        BulkheadStats as BulkheadStats,
        BulkheadWaited as BulkheadWaited,
        Slots as Slots,
    )
    from meshkit.call_registry import (
        CallEnded as CallEnded,
        CallRegistry as CallRegistry,
        CallRegistryStats as CallRegistryStats,
        PendingCalls as PendingCalls,
        ReplyIgnored as ReplyIgnored,
    )
    from meshkit.circuit_breaker import (
        Circuit as Circuit,
        CircuitBreaker as CircuitBreaker,
        CircuitChanged as CircuitChanged,
        CircuitStats as CircuitStats,
        FailureRate as FailureRate,
        State as State,
    )
    from meshkit.consensus import (
        ConsensusHelper as ConsensusHelper,
        Outcome as Outcome,
        majority as majority,
        median as median,
        plurality as plurality,
        trimmed_mean as trimmed_mean,
    )
    from meshkit.dedup import (
        DedupCache as DedupCache,
        DedupStats as DedupStats,
        KeyEvicted as KeyEvicted,
        SeenKeys as SeenKeys,
    )
    from meshkit.encryptor import Encryptor as Encryptor, Sealed as Sealed
    from meshkit.errors import (
        BadSeal as BadSeal,
        BadSignature as BadSignature,
        BatchFull as BatchFull,
        BulkheadFull as BulkheadFull,
        CallTimeout as CallTimeout,
        CircuitOpen as CircuitOpen,
        Closed as Closed,
        Draining as Draining,
        Executed as Executed,
        MalformedFrame as MalformedFrame,
        MeshkitError as MeshkitError,
        NoHandler as NoHandler,
        NoQuorum as NoQuorum,
        OutcomeUnknown as OutcomeUnknown,
        Overloaded as Overloaded,
        PeerLost as PeerLost,
        RateLimited as RateLimited,
        Refused as Refused,
        RemoteError as RemoteError,
        Replayed as Replayed,
        Stale as Stale,
        TooManyKeys as TooManyKeys,
        UnknownSender as UnknownSender,
        UnknownVoter as UnknownVoter,
        Unreachable as Unreachable,
        Untrusted as Untrusted,
    )
    from meshkit.events import Event as Event, Observer as Observer, notify as notify, report as report
    from meshkit.guard import (
        Guard as Guard,
        PerKey as PerKey,
        PerKeyStats as PerKeyStats,
        Stack as Stack,
        require_async as require_async,
        stack as stack,
    )
    from meshkit.hedger import Hedger as Hedger, HedgeStarted as HedgeStarted, HedgeWon as HedgeWon
    from meshkit.logger import (
        EventFormatter as EventFormatter,
        LogEntry as LogEntry,
        Logger as Logger,
        LoggerStats as LoggerStats,
        LogLevel as LogLevel,
        ServiceLog as ServiceLog,
    )
    from meshkit.rate_limiter import (
        KeyLimit as KeyLimit,
        LimitDenied as LimitDenied,
        LimitWaited as LimitWaited,
        RateLimiter as RateLimiter,
        RateLimiterStats as RateLimiterStats,
        SlidingWindow as SlidingWindow,
    )
    from meshkit.retrier import (
        Attempts as Attempts,
        Backoff as Backoff,
        GaveUp as GaveUp,
        Retrier as Retrier,
        RetryBudget as RetryBudget,
        RetryBudgetStats as RetryBudgetStats,
        Retrying as Retrying,
        RetryPolicy as RetryPolicy,
    )
    from meshkit.runtime import (
        Behavior as Behavior,
        Broadcast as Broadcast,
        Local as Local,
        Message as Message,
        Receiver as Receiver,
        Reject as Reject,
        Request as Request,
        Runtime as Runtime,
        RuntimeStats as RuntimeStats,
        Service as Service,
        ServiceFailed as ServiceFailed,
        Transport as Transport,
        broadcast as broadcast,
        handles as handles,
        local as local,
        request as request,
    )
    from meshkit.timeout import TimedOut as TimedOut, Timeout as Timeout
    from meshkit.transports import MemoryHub as MemoryHub, MemoryTransport as MemoryTransport
else:  # hidden from type checkers, to whom a __getattr__ would mean that every name exists
    __getattr__, __all__ = lazily(
        __name__,
        {
            "errors": [
                "BadSeal",
                "BadSignature",
                "BatchFull",
                "BulkheadFull",
                "CallTimeout",
                "CircuitOpen",
                "Closed",
                "Draining",
                "Executed",
                "MalformedFrame",
                "MeshkitError",
                "NoHandler",
                "NoQuorum",
                "OutcomeUnknown",
                "Overloaded",
                "PeerLost",
                "RateLimited",
                "Refused",
                "RemoteError",
                "Replayed",
                "Stale",
                "TooManyKeys",
                "UnknownSender",
                "UnknownVoter",
                "Unreachable",
                "Untrusted",
            ],
            "events": ["Event", "Observer", "notify", "report"],
            "guard": ["Guard", "PerKey", "PerKeyStats", "Stack", "require_async", "stack"],
            "batch": ["Batch", "BatchCollector", "BatchDone", "BatchStats", "Taken"],
            "bulkhead": ["Bulkhead", "BulkheadRefused", "BulkheadStats", "BulkheadWaited", "Slots"],
            "call_registry": ["CallEnded", "CallRegistry", "CallRegistryStats", "PendingCalls", "ReplyIgnored"],
            "circuit_breaker": ["Circuit", "CircuitBreaker", "CircuitChanged", "CircuitStats", "FailureRate", "State"],
            "consensus": ["ConsensusHelper", "Outcome", "majority", "median", "plurality", "trimmed_mean"],
            "dedup": ["DedupCache", "DedupStats", "KeyEvicted", "SeenKeys"],
            "encryptor": ["Encryptor", "Sealed"],
            "hedger": ["HedgeStarted", "HedgeWon", "Hedger"],
            "logger": ["EventFormatter", "LogEntry", "LogLevel", "Logger", "LoggerStats", "ServiceLog"],
            "rate_limiter": [
                "KeyLimit",
                "LimitDenied",
                "LimitWaited",
                "RateLimiter",
                "RateLimiterStats",
                "SlidingWindow",
            ],
            "retrier": [
                "Attempts",
                "Backoff",
                "GaveUp",
                "Retrier",
                "RetryBudget",
                "RetryBudgetStats",
                "RetryPolicy",
                "Retrying",
            ],
            "timeout": ["TimedOut", "Timeout"],
            "runtime": [
                "Behavior",
                "Broadcast",
                "Local",
                "Message",
                "Receiver",
                "Reject",
                "Request",
                "Runtime",
                "RuntimeStats",
                "Service",
                "ServiceFailed",
                "Transport",
                "broadcast",
                "handles",
                "local",
                "request",
            ],
            "transports": ["MemoryHub", "MemoryTransport"],
        },
    )
