"""The choice of bits: within the size, never dearer than need be, the same every time."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.errors import ConfigError
from flashmoe.evaluation.choose_bits import Option, choose

UNITS = {
    "a": [Option(4, 400, 0.0), Option(3, 300, 0.1), Option(2, 200, 5.0)],
    "b": [Option(4, 400, 0.0), Option(3, 300, 0.2), Option(2, 200, 0.3)],
}


@pytest.mark.parametrize(
    ("most", "bits"),
    [(800, (4, 4)), (700, (3, 4)), (600, (3, 2)), (500, (3, 2)), (400, (2, 2))],
)
def test_cheap_bytes_go_first(most: int, bits: tuple[int, int]) -> None:
    choice = choose(UNITS, most)
    assert (choice.bits["a"], choice.bits["b"]) == bits
    assert (
        choice.nbytes
        == sum(o.nbytes for u, b in choice.bits.items() for o in UNITS[u] if o.bits == b)
        <= most
    )


def test_too_small_a_target_is_one_line() -> None:
    with pytest.raises(ConfigError, match="larger --target-size"):
        choose(UNITS, 399)


def test_a_step_that_costs_nothing_is_taken_only_when_it_must() -> None:
    flat = {"a": [Option(4, 400, 0.0), Option(3, 300, 0.0)]}
    assert choose(flat, 400).bits["a"] == 3, "fewer bytes and no worse"


option_lists = st.lists(
    st.tuples(st.integers(1, 50), st.floats(0, 10)), min_size=1, max_size=4, unique_by=lambda pair: pair[0]
)


@given(st.lists(option_lists, min_size=1, max_size=4), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_no_choice_of_its_size_is_better_by_more_than_one_step(
    drawn: list[list[tuple[int, float]]], share: float
) -> None:
    """The relaxed problem's greedy is at most one step of one unit above the best whole choice."""
    units = {
        str(i): [Option(n, nbytes, kl) for n, (nbytes, kl) in enumerate(found)]
        for i, found in enumerate(drawn)
    }
    least = sum(min(o.nbytes for o in found) for found in units.values())
    largest = sum(max(o.nbytes for o in found) for found in units.values())
    most = int(least + share * (largest - least))
    choice = choose(units, most)
    assert choice.nbytes <= most
    best = min(
        sum(o.kl for o in some) for some in product(*units.values()) if sum(o.nbytes for o in some) <= most
    )
    slack = max(max(o.kl for o in found) - min(o.kl for o in found) for found in units.values())
    assert best <= choice.kl + 1e-9
    assert choice.kl <= best + slack + 1e-9
    assert choose(units, most) == choice
