"""The core of the proxy: whatever comes, in whatever parts, what it decides is up to the seed and the position."""

import itertools
import math
from random import Random
from typing import Any

import pytest
from hypothesis import given, strategies as st

from meshkit.testing._chaos import Chaos, End, Reset

SEEDS = st.integers(0, 1000)
STREAMS = st.binary(max_size=5_000)
SETTINGS = st.fixed_dictionaries(
    {
        "latency": st.sampled_from([0.0, 0.5]),
        "jitter": st.sampled_from([0.0, 0.25]),
        "rate": st.sampled_from([None, 1, 1000]),
        "max_slice": st.sampled_from([1, 2, 100, 1460]),
        "reset_rate": st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    }
)


def chaos(seed: int = 1, **settings: Any) -> Chaos:
    defaults: dict[str, Any] = {"latency": 0.0, "jitter": 0.0, "rate": None, "max_slice": 1460, "reset_rate": 0.0}
    return Chaos(Random(seed), **{**defaults, **settings})


def drain(core: Chaos) -> list[tuple[float, Any]]:
    """Return everything that it will do, with the time of each."""
    done = []
    while (when := core.when) < math.inf:
        assert core.next(math.nextafter(when, -math.inf)) is None, "nothing happens before its time"
        done.append((when, core.next(when)))
    assert core.next(math.inf) is None
    return done


def passed(done: list[tuple[float, Any]]) -> bytes:
    return b"".join(action for _, action in done if isinstance(action, bytes))


def fates(done: list[tuple[float, Any]]) -> list[float]:
    """Return when each byte is passed on."""
    return [when for when, action in done if isinstance(action, bytes) for _ in action]


@given(SEEDS, STREAMS, SETTINGS, st.lists(st.integers(0, 5_000)))
def test_the_same_bytes_meet_the_same_fate_however_they_come_in(
    seed: int, stream: bytes, settings: dict[str, Any], cuts: list[int]
) -> None:
    whole, parts = chaos(seed, **settings), chaos(seed, **settings)
    whole.feed(stream, 10.0)
    whole.end(10.0)
    bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    for begin, end in itertools.pairwise(bounds):
        parts.feed(stream[begin:end], 10.0)
    parts.end(10.0)
    one, other = drain(whole), drain(parts)
    assert passed(one) == passed(other)
    assert type(one[-1][1]) is type(other[-1][1])
    if settings["rate"] is None:
        assert fates(one) == fates(other), "to the byte, at the same time"
        assert one[-1][0] == other[-1][0]


@given(SEEDS, STREAMS, SETTINGS)
def test_what_passes_is_what_came_in_order_up_to_a_reset(seed: int, stream: bytes, settings: dict[str, Any]) -> None:
    core = chaos(seed, **settings)
    core.feed(stream, 0.0)
    assert core.waiting == len(stream) or settings["reset_rate"]
    core.end(0.0)
    core.feed(b"too late", 0.0)
    core.end(0.0)
    done = drain(core)
    assert core.waiting == 0
    assert stream.startswith(passed(done))
    assert [type(action) for _, action in done[:-1]] == [bytes] * (len(done) - 1)
    if isinstance(done[-1][1], End):
        assert passed(done) == stream
    else:
        assert isinstance(done[-1][1], Reset)
        assert settings["reset_rate"] > 0
    times = [when for when, _ in done]
    assert times == sorted(times), "nothing overtakes"
    assert all(0 < len(action) <= settings["max_slice"] for _, action in done if isinstance(action, bytes))


@given(SEEDS, st.lists(st.tuples(st.binary(max_size=50), st.floats(0, 1)), max_size=20), SETTINGS)
def test_each_byte_is_under_way_for_the_latency_and_no_longer_than_it_may_be(
    seed: int, parts: list[tuple[bytes, float]], settings: dict[str, Any]
) -> None:
    settings = {**settings, "reset_rate": 0.0}
    core, now, came = chaos(seed, **settings), 0.0, list[float]()
    for data, pause in parts:
        now += pause
        core.feed(data, now)
        came += [now] * len(data)
    link_free = 0.0
    for arrival, departure in zip(came, fates(drain(core)), strict=True):
        link_free = max(link_free, arrival) + (1 / settings["rate"] if settings["rate"] else 0.0)
        least = arrival + settings["latency"]
        assert departure >= least - 1e-9
        if settings["rate"] is None:
            assert departure <= max(came) + settings["latency"] + settings["jitter"]
        else:
            assert departure >= link_free - 1e-6, "no faster than the rate"


def test_jitter_is_drawn_for_each_slice() -> None:
    core = chaos(jitter=1.0, max_slice=1)
    core.feed(bytes(50), 0.0)
    times = fates(drain(core))
    assert len(set(times)) > 3
    assert 0 < times[0] < times[-1] <= 1.0


def test_slices_are_of_all_sizes_up_to_the_limit() -> None:
    core = chaos(max_slice=3)
    core.feed(bytes(300), 0.0)
    sizes = {len(action) for _, action in drain(core)}
    assert sizes == {1, 2, 3}


def test_no_byte_waits_for_the_rest_of_its_slice() -> None:
    core = chaos(max_slice=1460)
    for number in range(10):
        core.feed(bytes([number]), 0.0)
        assert core.next(0.0) == bytes([number])


def test_the_rate_is_that_of_the_link() -> None:
    core = chaos(rate=100)
    core.feed(bytes(50), 0.0)
    core.feed(bytes(50), 0.0)
    core.end(0.0)
    assert drain(core)[-1][0] == pytest.approx(1.0)
    core = chaos(rate=100)
    core.feed(bytes(50), 0.0)
    core.feed(bytes(50), 10.0)
    core.end(10.0)
    assert drain(core)[-1][0] == pytest.approx(10.5), "what was not used is not saved up"


def test_resets_come_as_often_as_they_should_and_anywhere_in_a_block() -> None:
    positions = []
    for seed in range(2_000):
        core = chaos(seed, reset_rate=0.25)
        core.feed(bytes(Chaos.BLOCK), 0.0)
        core.end(0.0)
        done = drain(core)
        if isinstance(done[-1][1], Reset):
            positions.append(len(passed(done)))
    assert 400 < len(positions) < 600
    assert min(positions) < 50 < 950 < max(positions) <= Chaos.BLOCK


def test_a_reset_comes_behind_the_bytes_before_it_and_nothing_comes_behind_a_reset() -> None:
    core = chaos(reset_rate=1.0, latency=1.0)
    core.feed(bytes(2 * Chaos.BLOCK), 0.0)
    waiting = core.waiting
    core.feed(bytes(10), 0.0)
    core.end(0.0)
    assert core.waiting == waiting
    done = drain(core)
    assert isinstance(done[-1][1], Reset)
    assert {when for when, _ in done} == {1.0}


def test_how_slices_are_cut_does_not_decide_where_it_resets() -> None:
    def at(**settings: Any) -> int:
        core = chaos(5, reset_rate=0.2, **settings)
        core.feed(bytes(100_000), 0.0)
        return len(passed(drain(core)))

    assert at(max_slice=1) == at(max_slice=1460) == at(jitter=1.0)
