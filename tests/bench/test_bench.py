import pytest

from tests.bench.__main__ import names, rows, show


@pytest.mark.parametrize("name", names())
def test_every_benchmark_runs(name: str) -> None:
    """Only that it runs: no time is asserted, and with so few rounds its figures mean nothing."""
    assert all(show(row) for row in rows(name, quick=True))
