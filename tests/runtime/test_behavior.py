import asyncio
import datetime as dt
import pickle
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, cast

import msgspec
import pytest

from meshkit.runtime import Behavior, Broadcast, Local, Message, Reject, Request, broadcast, handles, local, request
from meshkit.runtime.handling import behaviors_of


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
    with pytest.raises(TypeError, match="a: the reply must be a type, not None"):
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


@pytest.mark.parametrize("code", ["internal", "bad_reply"])
def test_a_reject_cannot_pass_for_an_accident(code: str) -> None:
    with pytest.raises(ValueError, match=f"the code of a Reject cannot be '{code}', which says that nobody chose"):
        Reject(code)


def test_the_detail_of_a_reject_can_always_travel() -> None:
    assert Reject("missing", "no file \udcff").detail == "no file \\udcff"


def test_a_reject_pickles() -> None:
    copied = pickle.loads(pickle.dumps(Reject("quota", "too much", retryable=True)))
    assert (copied.code, copied.detail, copied.retryable) == ("quota", "too much", True)
