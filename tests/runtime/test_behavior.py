import asyncio
import datetime as dt
import pickle
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, cast

import msgspec
import pytest

from meshkit import RetryPolicy
from meshkit.runtime import (
    Behavior,
    Broadcast,
    Continue,
    Local,
    Message,
    Reject,
    Request,
    Stage,
    broadcast,
    ephemeral,
    handles,
    local,
    request,
)
from meshkit.runtime.service import behaviors_of


class Payload(msgspec.Struct, frozen=True):
    value: int


class Child(Payload, frozen=True):
    more: int = 0


def test_the_templates_make_behaviors() -> None:
    assert isinstance(local("a", int), Local)
    assert isinstance(broadcast("a", int), Broadcast)
    made = request("a", Payload, reply=list[int])
    assert isinstance(made, Request)
    assert (made.kind, made.payload, made.reply) == ("a", Payload, list[int])


def test_equal_declarations_are_the_same_behavior() -> None:
    assert request("a", int, reply=str) == request("a", int, reply=str)
    one, other = request("a", int, reply=str), request("a", int, reply=int)
    assert cast("Behavior[int]", one) != other
    assert cast("Behavior[int]", local("a", int)) != broadcast("a", int)
    assert len({local("a", int), local("a", int), local("b", int)}) == 2


def test_a_behavior_says_what_it_is() -> None:
    assert repr(local("a:b", int)) == "Local('a:b', int)"
    assert repr(broadcast("a:b", list[int])) == "Broadcast('a:b', list[int])"
    assert repr(request("a:b", Payload, reply=bool)) == "Request('a:b', Payload, reply=bool)"


def test_a_behavior_pickles_whether_it_has_been_used_or_not() -> None:
    made = request("a", Payload, reply=bool)
    made.check(Payload(1))
    assert pickle.loads(pickle.dumps(made)) == made
    made.prepare()
    assert pickle.loads(pickle.dumps(made)) == made


@pytest.mark.parametrize("kind", ["", "a b", "a\n", "a\u2003b", "\x1b[31m", "\ud800", 3, None])
def test_a_kind_is_text_without_spaces(kind: Any) -> None:
    with pytest.raises(ValueError, match="the kind of a behavior must be text without spaces"):
        local(kind, int)


@pytest.mark.parametrize("payload", [3, "int", None, [int]])
def test_a_payload_is_declared_by_its_type(payload: Any) -> None:
    with pytest.raises(TypeError, match="a: the payload must be a type, not"):
        local("a", payload)


def test_a_reply_is_declared_by_its_type() -> None:
    with pytest.raises(
        TypeError, match=r"a: the reply must be a type, not None; where there is none, give type\(None\)"
    ):
        request("a", int, reply=cast("type[int]", None))
    with pytest.raises(TypeError, match="reply"):
        request("a", int)  # type: ignore[call-arg]  # what happens then is what is tested


class Quacks(Protocol):
    def quack(self) -> None: ...


@pytest.mark.parametrize(
    ("declared", "good", "bad"),
    [
        (int, 3, "3"),
        (Payload, Child(1), {"value": 1}),
        (list[int], ["checked by whoever decodes it"], (1,)),
        (dict[str, list[int]], {}, []),
        (Annotated[int, msgspec.Meta(ge=0)], 3, None),
        (int | None, None, None),
        (Literal["a"], "a", None),
        (Any, object(), None),
        (object, None, None),
        (Quacks, 3, None),
        (type(None), None, 0),
    ],
)
def test_a_payload_is_checked_as_far_as_isinstance_can(declared: Any, good: object, bad: object) -> None:
    behavior = local("a", declared)
    behavior.check(good)
    if bad is not None:
        with pytest.raises(TypeError, match=f"a: the payload must be .*, not {type(bad).__name__}"):
            behavior.check(bad)


def test_a_reply_is_checked_too() -> None:
    behavior = request("a", int, reply=list[int])
    behavior.check_reply([1])
    with pytest.raises(TypeError, match=r"a: the reply must be list\[int\], not tuple"):
        behavior.check_reply((1,))


def test_a_behavior_may_be_declared_before_what_it_refers_to() -> None:
    class Tree(msgspec.Struct):
        children: "list[Leaf]"  # type: ignore[name-defined]  # noqa: F821 - not yet, that is the point

    declared = broadcast("a", Tree)
    with pytest.raises(NameError, match="Leaf"):
        declared.prepare()
    globals()["Leaf"] = int
    declared.prepare()
    del globals()["Leaf"]


class Recursive(msgspec.Struct):
    children: "list[Recursive]" = []
    parent: "Recursive | None" = None


@dataclass
class Deep:
    values: dict[str, tuple[int, list[complex]]]


def test_what_msgspec_knows_can_travel() -> None:
    travelling: list[Any] = [
        int,
        list[Payload],
        Recursive,
        Any,
        type(None),
        dict[str, dt.datetime],
        Annotated[int, "x"],
    ]
    for declared in travelling:
        broadcast("a", declared).prepare()


@pytest.mark.parametrize("declared", [complex, list[complex], Deep])
def test_what_msgspec_does_not_know_cannot_travel(declared: Any) -> None:
    for behavior in (broadcast("a", declared), request("a", declared, reply=int), request("a", int, reply=declared)):
        with pytest.raises(TypeError, match="complex is not a Struct, a dataclass or another type that msgspec enc"):
            behavior.prepare()


def test_a_local_payload_need_not_be_able_to_travel() -> None:
    local("a", complex).prepare()
    local("a", asyncio.Task).prepare()


def test_handles_marks_a_method_and_leaves_it_as_it_is() -> None:
    first, second = local("a", int), local("b", int)

    async def method(_self: object, _msg: Message[int]) -> None: ...

    assert behaviors_of(method) == ()
    assert handles(first)(method) is method
    handles(second)(method)
    assert behaviors_of(method) == (first, second)


def test_handles_needs_a_behavior() -> None:
    async def method() -> None: ...

    with pytest.raises(TypeError, match=r"@handles needs a behavior, as in @handles\(STORE\)"):
        handles(cast("Any", method))


def test_a_reject_says_its_code_and_detail() -> None:
    assert str(Reject("quota", "too much", retryable=True)) == "quota: too much"
    assert str(Reject("quota")) == "quota"
    assert Reject("quota").retryable is False


@pytest.mark.parametrize("code", ["", "two words", None, 404])
def test_a_reject_needs_a_code(code: Any) -> None:
    with pytest.raises(ValueError, match="the code of a Reject must be text without spaces"):
        Reject(code)


@pytest.mark.parametrize("code", ["internal", "bad_reply", "reply_forgotten"])
def test_a_reject_cannot_pass_for_an_accident(code: str) -> None:
    with pytest.raises(ValueError, match=f"the code of a Reject cannot be '{code}', which says that nobody chose"):
        Reject(code)


def test_the_detail_of_a_reject_can_always_travel() -> None:
    assert Reject("missing", "no file \udcff").detail == "no file \\udcff"


def test_a_reject_pickles() -> None:
    copied = pickle.loads(pickle.dumps(Reject("quota", "too much", retryable=True)))
    assert (copied.code, copied.detail, copied.retryable) == ("quota", "too much", True)


def passes(msg: Message[Any]) -> Continue:
    return Continue(msg)


async def waits(_: object) -> bool:
    return True


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"rate_limit": 5}, "rate_limit must be (max_count, window), not 5"),
        ({"rate_limit": [5, 1.0]}, "rate_limit must be (max_count, window), not [5, 1.0]"),
        ({"rate_limit": (5,)}, "rate_limit must be (max_count, window), not (5,)"),
        ({"rate_limit": (0, 1.0)}, "max_count of rate_limit must be"),
        ({"rate_limit": (1, float("nan"))}, "window of rate_limit must be"),
        ({"remember": 0}, "remember must be"),
        ({"remember": float("inf")}, "remember must be"),
        ({"max_mailbox": 0}, "max_mailbox must be"),
        ({"max_concurrent": 1.5}, "max_concurrent must be"),
        ({"content_key": "id"}, "content_key must be a function that is not async, not 'id'"),
        ({"content_key": waits}, "content_key must be a function that is not async"),
        ({"filter": True}, "filter must be a function that is not async, not True"),
        ({"filter": waits}, "filter must be a function that is not async"),
        ({"order_by": "kind"}, "order_by must be \"sender\", or a function that is not async, not 'kind'"),
        ({"order_by": waits}, 'order_by must be "sender", or a function that is not async'),
        ({"overflow": "wait"}, "overflow must be drop_newest or drop_oldest for this kind, not 'wait'"),
        ({"retry": 3}, "retry must be a RetryPolicy, not 3"),
        ({"retry": RetryPolicy(timeout=1.0)}, "retry is bounded by max_retries and the caller's deadline"),
        ({"on_error": "ignore"}, "on_error must be one of log, drop, dead_letter, raise, not 'ignore'"),
        ({"stages": [passes]}, "stages must be of Stage(name, run), not <function passes"),
        ({"stages": [Stage("a", passes), Stage("a", passes)]}, "two stages of the same name: a, a"),
        ({"upgrade": str}, "a newer version is declared from the one before"),
        ({"older": local("a:b", int)}, "a newer version is declared from the one before"),
    ],
)
def test_an_option_that_cannot_be_is_named_with_the_kind(options: dict[str, Any], fault: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        broadcast("a:b", int, **options)
    assert str(caught.value).startswith(f"a:b: {fault}")


def test_an_option_that_makes_no_sense_for_a_template_is_refused() -> None:
    with pytest.raises(ValueError, match="a:b: content_key makes no sense for a request: each caller waits"):
        request("a:b", int, reply=int, content_key=int)
    for make in (local, ephemeral):
        with pytest.raises(ValueError, match="a:b: remember needs a content_key here"):
            make("a:b", int, remember=5.0)
        assert make("a:b", int, remember=5.0, content_key=int).ttl == 5.0
    with pytest.raises(ValueError, match="remember needs a content_key"):
        request("a:b", int, reply=int, remember=5.0)
    with pytest.raises(ValueError, match="a:b: stage 'raw' cannot come before decode: what is local is not encoded"):
        local("a:b", int, stages=[Stage("raw", passes, "decode")])
    with pytest.raises(ValueError, match="overflow must be refuse for this kind, not 'drop_oldest'"):
        request("a:b", int, reply=int, overflow="drop_oldest")


def test_what_is_not_said_has_a_default_for_each_template() -> None:
    declared: list[Behavior[int]] = [
        local("a", int),
        broadcast("a", int),
        ephemeral("a", int),
        request("a", int, reply=int),
    ]
    assert [behavior.overflow for behavior in declared] == ["wait", "drop_newest", "drop_oldest", "refuse"]
    assert [behavior.own_mailbox for behavior in declared] == [False, False, True, False]
    assert {behavior.ttl for behavior in declared} == {60.0}
    assert broadcast("a", int, remember=5.0).ttl == 5.0


def test_a_behavior_with_every_option_is_hashable_and_equal_to_its_like() -> None:
    def made() -> Broadcast[str]:
        return broadcast(
            "a:b",
            str,
            content_key=len,
            remember=1.0,
            rate_limit=(1, 2.0),
            filter=bool,
            order_by="sender",
            max_mailbox=1,
            max_concurrent=1,
            overflow="drop_oldest",
            retry=RetryPolicy(),
            on_error="raise",
            stages=[Stage("a", passes)],
        )

    assert made() == made()
    assert len({made(), made(), made().next(str), made().next(str)}) == 2
    assert pickle.loads(pickle.dumps(made())) == made()


def test_an_int_will_do_for_a_float_as_for_type_checkers() -> None:
    kind = request("a", float, reply=float)
    kind.check(1)
    kind.check_reply(2)
    with pytest.raises(TypeError, match="must be float, not str"):
        kind.check("1")
