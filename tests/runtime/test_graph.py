import re
from typing import Any, cast

import pytest

from meshkit.runtime import Message, Service, broadcast, handles, local, request
from meshkit.runtime.graph import Graph

ASK = request("x:ask", int, reply=int)
ASK_OTHERWISE = request("x:ask", int, reply=str)
TELL = broadcast("x:tell", int)
NOTE = local("x:note", int)


class Good(Service):
    name = "good"

    @handles(ASK)
    async def ask(self, msg: Message[int]) -> int:
        return msg.payload

    @handles(TELL)
    async def tell(self, msg: Message[int]) -> None: ...

    @handles(NOTE)
    async def note(self, msg: Message[int]) -> None: ...


def faults(*services: Any) -> list[str]:
    """Return what is wrong with the services, one fault a line."""
    with pytest.raises(ValueError, match="node 'alice' cannot start:") as caught:
        Graph("alice", services)
    return str(caught.value).splitlines()[1:]


def named(name: str, base: type[Service] = Service, **members: Any) -> Service:
    made: Service = type("Some", (base,), {"name": name, **members})()
    return made


def test_a_graph_finds_the_handlers_by_kind() -> None:
    good = Good()
    graph = Graph("alice", [good])
    assert graph.routes["x:ask", 1].handlers[0].method == good.ask
    assert [handler.method for handler in graph.routes["x:tell", 1].handlers] == [good.tell]
    assert cast("Any", graph.local_route(NOTE)).handlers[0].method == good.note
    assert repr(graph.routes["x:ask", 1].handlers) == "(good.ask,)"
    assert graph.requests == ("x:ask",)


def test_no_services_are_fine() -> None:
    assert Graph("alice", []).handlers == []


def test_several_services_may_handle_an_event_but_one_only_a_request() -> None:
    other = named("other", Good)
    assert faults(Good(), other) == ["  service 'other': ask(): 'x:ask' is handled by good.ask already"]
    silent = named("other", Good, ask=None)
    assert len(Graph("alice", [Good(), silent]).routes["x:tell", 1].handlers) == 2


def test_one_service_handles_a_kind_once() -> None:
    @handles(NOTE)
    async def again(self: Service, msg: Message[int]) -> None: ...

    assert faults(named("x", Good, zzz=again)) == ["  service 'x': zzz(): 'x:note' is handled by x.note already"]


def test_members_that_answer_to_any_name_are_no_handlers() -> None:
    class Answers:
        def __getattr__(self, name: str) -> str:
            return name

    assert Graph("alice", [named("x", answers=Answers())]).handlers == []


def test_one_method_may_handle_several_kinds() -> None:
    @handles(NOTE)
    @handles(local("x:other", int))
    async def both(self: Service, msg: Message[int]) -> None: ...

    graph = Graph("alice", [named("x", both=both)])
    assert [handler.behavior.kind for handler in graph.handlers] == ["x:other", "x:note"]


def test_a_kind_is_declared_once() -> None:
    @handles(ASK_OTHERWISE)
    async def ask(self: Service, msg: Message[int]) -> str:
        return ""

    [fault] = faults(Good(), named("other", ask=ask))
    assert fault == (
        "  service 'other': ask(): 'x:ask' is declared as Request('x:ask', int, reply=str) here, "
        "and as Request('x:ask', int, reply=int) for good.ask"
    )


def test_a_local_kind_is_emitted_as_it_is_handled() -> None:
    graph = Graph("alice", [Good()])
    assert graph.local_route(local("x:note", int)), "an equal declaration will do"
    with pytest.raises(ValueError, match=r"Local\('x:note', str\) is emitted, but good.note handles Local"):
        graph.local_route(local("x:note", str))


def test_a_handler_is_async_and_takes_one_message() -> None:
    def plain(self: Service, msg: Message[int]) -> None: ...
    async def nothing(self: Service) -> None: ...
    async def two(self: Service, msg: Message[int], more: int) -> None: ...
    async def keyword(self: Service, *, msg: Message[int]) -> None: ...
    async def default(self: Service, msg: Message[int], more: int = 0) -> None: ...

    def fault(method: Any) -> str:
        return faults(named("x", method=handles(NOTE)(method)))[0].strip()

    assert fault(plain) == "service 'x': method() handles messages, so it must be `async def`"
    takes = r"service 'x': method\(\) must take one message, `\(self, msg\)`, and takes "
    assert re.match(takes + r"\(self", fault(nothing))
    assert re.match(takes, fault(two))
    assert re.match(takes, fault(keyword))
    Graph("alice", [named("x", method=handles(NOTE)(default))])


def test_what_has_to_travel_must_be_able_to() -> None:
    @handles(broadcast("x:odd", complex))
    async def odd(self: Service, msg: Message[complex]) -> None: ...

    @handles(request("x:reply", int, reply=complex))
    async def reply(self: Service, msg: Message[int]) -> complex:
        return 0j

    why = "cannot travel: complex is not a Struct, a dataclass or another type that msgspec encodes"
    assert faults(named("x", odd=odd, reply=reply)) == [
        f"  service 'x': odd(): 'x:odd' {why}",
        f"  service 'x': reply(): 'x:reply' {why}",
    ]


def test_an_override_handles_what_it_overrides() -> None:
    class Child(Good):
        async def ask(self, msg: Message[int]) -> int:
            return -msg.payload

    child = Child()
    assert Graph("alice", [child]).routes["x:ask", 1].handlers[0].method == child.ask


def test_an_override_with_none_handles_nothing() -> None:
    assert not Graph("alice", [named("x", Good, ask=None)]).requests


@pytest.mark.parametrize("name", ["", "two words", 3])
def test_a_service_needs_a_name(name: Any) -> None:
    assert faults(named(name)) == [f"  the name of Some must be text without spaces, not {name!r}"]


def test_a_service_without_a_name_is_told_so() -> None:
    assert faults(Service()) == ['  Service has no name: give it one, as in `name = "stash"`']


def test_the_names_of_services_are_unique_and_not_that_of_the_runtime() -> None:
    assert faults(named("x"), named("x"), named("runtime")) == [
        "  service 'x': the name is taken",
        "  service 'runtime': the name is taken",
    ]


def test_only_services_are_services() -> None:
    assert faults(Good, 3) == [
        f"  {Good!r} is not a service: pass instances of subclasses of Service",
        "  3 is not a service: pass instances of subclasses of Service",
    ]


@pytest.mark.parametrize("attribute", ["max_mailbox", "max_concurrent"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_counts_are_checked(attribute: str, value: Any) -> None:
    [fault] = faults(named("x", **{attribute: value}))
    assert fault.startswith(f"  service 'x': {attribute} must be")


@pytest.mark.parametrize("attribute", ["start_timeout", "stop_timeout", "restart_window"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "1"])
def test_durations_are_checked(attribute: str, value: Any) -> None:
    [fault] = faults(named("x", **{attribute: value}))
    assert fault.startswith(f"  service 'x': {attribute} must be")


def test_a_service_may_have_no_restarts_but_not_fewer() -> None:
    Graph("alice", [named("x", max_restarts=0)])
    assert faults(named("x", max_restarts=-1)) == ["  service 'x': max_restarts must be at least 0, not -1"]


def test_hooks_are_async_where_they_may_wait() -> None:
    def plain(self: Service) -> None: ...
    async def waiting(self: Service) -> None: ...

    assert faults(named("x", init=waiting, start=plain, stop=plain)) == [
        "  service 'x': init() must not be `async def`",
        "  service 'x': start() must be `async def`",
        "  service 'x': stop() must be `async def`",
    ]


def test_all_faults_are_told_at_once() -> None:
    class Bad(Good):
        name = "bad"

        @handles(cast("Any", TELL))
        def tell(self, msg: Message[int]) -> None: ...

    assert len(faults(Good(), Bad())) == 2


class New(Service):
    name = "new"

    @handles(ASK.next(str, reply=int).next(bytes, reply=int, upgrade=str.encode))
    async def ask(self, msg: Message[bytes]) -> int:
        return 0


def test_a_gap_between_versions_names_the_handler_that_leaves_it() -> None:
    [fault] = faults(New())
    assert fault == (
        "  service 'new': ask(): Request('x:ask', int, reply=int) has no handler, and no upgrade to version 2"
    )


def test_a_gap_is_closed_by_a_handler_or_an_upgrade() -> None:
    @handles(ASK)
    async def old(self: Service, msg: Message[int]) -> int:
        return 0

    graph = Graph("alice", [named("x", New, old=old)])
    assert {key: str(route.handlers) for key, route in graph.routes.items()} == {
        ("x:ask", 1): "(x.old,)",
        ("x:ask", 2): "(x.ask,)",
        ("x:ask", 3): "(x.ask,)",
    }
    assert graph.requests == ("x:ask",)


def test_an_upgraded_request_has_the_reply_of_its_handler() -> None:
    @handles(ASK.next(str, reply=str, upgrade=str))
    async def ask(self: Service, msg: Message[str]) -> str:
        return ""

    assert faults(named("x", ask=ask)) == [
        (
            "  service 'x': ask(): Request('x:ask', int, reply=int) is upgraded for this handler, "
            "whose reply is of Request('x:ask', str, version=2, reply=str)"
        )
    ]


def test_two_next_versions_of_one_kind_are_two_declarations() -> None:
    @handles(TELL.next(str, upgrade=str))
    async def one(self: Service, msg: Message[str]) -> None: ...

    @handles(TELL.next(bytes, upgrade=bytes))
    async def other(self: Service, msg: Message[bytes]) -> None: ...

    [fault] = faults(named("x", one=one), named("y", other=other))
    assert fault == (
        "  service 'y': other(): 'x:tell' is declared as Broadcast('x:tell', bytes, version=2) here, "
        "and as Broadcast('x:tell', str, version=2) for x.one"
    )


@pytest.mark.parametrize("turned", [False, True])
def test_no_service_may_miss_a_version_that_another_one_handles(turned: bool) -> None:
    """Each message goes to the handlers of its version: a second service would take them from the first."""

    @handles(TELL)
    async def old(self: Service, msg: Message[int]) -> None: ...

    @handles(TELL.next(str, upgrade=str))
    async def new(self: Service, msg: Message[str]) -> None: ...

    first, second = named("a", old=old), named("b", new=new)
    services = [second, first] if turned else [first, second]
    assert sorted(faults(*services)) == [
        "  service 'a': old(): 'x:tell' of version 2 is handled by b.new only",
        "  service 'b': new(): 'x:tell' of version 1 is handled by a.old only",
    ]
    Graph("alice", [named("a", old=old, new=new), named("b", old=old, new=new)])
    Graph("alice", [named("a", new=new), named("b", new=new)])


def test_an_older_version_must_be_able_to_travel_too() -> None:
    @handles(broadcast("x:odd", complex).next(str, upgrade=str))
    async def odd(self: Service, msg: Message[str]) -> None: ...

    [fault] = faults(named("x", odd=odd))
    assert fault.startswith("  service 'x': odd(): 'x:odd' cannot travel: complex is not")
