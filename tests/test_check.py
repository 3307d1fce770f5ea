import math
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, strategies as st

from meshkit import _check

NO_NUMBERS: list[Any] = [None, True, False, "5", b"5", [5], 5j, Decimal(5), Fraction(5), ...]


@given(st.one_of(st.integers(), st.floats()))
def test_a_duration_is_a_finite_number_of_seconds_more_than_zero(value: float) -> None:
    valid = math.isfinite(value) and value > 0
    if valid:
        checked = _check.duration("timeout", value)
        assert checked == value
        assert type(checked) is float
        assert _check.duration("timeout", value, zero=True) == value
    else:
        with pytest.raises(ValueError, match="timeout must be finite and more than zero seconds"):
            _check.duration("timeout", value)


@pytest.mark.parametrize("value", [0, 0.0, -0.0])
def test_zero_is_a_duration_only_where_that_is_said(value: float) -> None:
    with pytest.raises(ValueError, match=f"^delay must be finite and more than zero seconds, not {value!r}$"):
        _check.duration("delay", value)
    assert _check.duration("delay", value, zero=True) == 0.0


@pytest.mark.parametrize("value", [-1, -0.5, -math.inf, math.inf, math.nan])
def test_where_zero_is_a_duration_the_error_says_so(value: float) -> None:
    with pytest.raises(ValueError, match=f"^delay must be finite and zero or more seconds, not {value!r}$"):
        _check.duration("delay", value, zero=True)


def test_the_greatest_duration_is_the_greatest_float() -> None:
    assert _check.duration("timeout", sys.float_info.max) == sys.float_info.max
    assert _check.duration("timeout", int(sys.float_info.max)) == sys.float_info.max
    with pytest.raises(ValueError, match="timeout must be finite"):
        _check.duration("timeout", 10**400)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_a_duration_of_another_type_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^timeout must be a number of seconds, not ") as caught:
        _check.duration("timeout", value)
    assert str(caught.value).endswith(repr(value))


@given(value=st.integers(), minimum=st.integers(-5, 5))
def test_a_count_is_a_whole_number_of_at_least_the_minimum(value: int, minimum: int) -> None:
    if value >= minimum:
        assert _check.count("max_keys", value, minimum=minimum) == value
    else:
        with pytest.raises(ValueError, match=f"^max_keys must be at least {minimum}, not {value}$"):
            _check.count("max_keys", value, minimum=minimum)


def test_a_count_begins_at_one_if_nothing_else_is_said() -> None:
    assert _check.count("max_keys", 1) == 1
    with pytest.raises(ValueError, match=r"^max_keys must be at least 1, not 0$"):
        _check.count("max_keys", 0)


@pytest.mark.parametrize("value", [*NO_NUMBERS, 5.0, math.nan, math.inf], ids=repr)
def test_a_count_of_another_type_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^max_keys must be a whole number, not ") as caught:
        _check.count("max_keys", value)
    assert str(caught.value).endswith(repr(value))


@given(st.one_of(st.integers(), st.floats(), st.floats(0, 1)))
def test_a_ratio_is_more_than_zero_and_at_most_one(value: float) -> None:
    if 0 < value <= 1:
        checked = _check.ratio("threshold", value)
        assert checked == value
        assert type(checked) is float
    else:
        with pytest.raises(ValueError, match=r"^threshold must be more than 0 and at most 1, not ") as caught:
            _check.ratio("threshold", value)
        assert str(caught.value).endswith(repr(value))


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_a_ratio_of_another_type_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^threshold must be a number, not ") as caught:
        _check.ratio("threshold", value)
    assert str(caught.value).endswith(repr(value))


@pytest.mark.parametrize("check", [_check.duration, _check.ratio, _check.count])
def test_what_a_subclass_of_int_or_float_holds_is_taken(check: Callable[[str, Any], Any]) -> None:
    class Whole(int):
        pass

    assert check("argument", Whole(1)) == 1
    if check is not _check.count:

        class Real(float):
            pass

        assert type(check("argument", Real(1.0))) is float
