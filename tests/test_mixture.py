from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.mixture import LLAMA_SHARES, MAX_PERIOD, Schedule, parse_shares, shares_by_size
from llama_jax.errors import UserError

WEIGHTS = st.lists(st.integers(1, 500), min_size=1, max_size=9)


def shares_of(weights):
    return shares_by_size({f"s{i}": weight for i, weight in enumerate(weights)})


@settings(deadline=None, max_examples=150)
@given(weights=WEIGHTS)
def test_counts_never_stray_from_their_shares_by_a_whole_sample(weights):
    shares = shares_of(weights)
    schedule = Schedule(shares)
    n = 2 * schedule.period + 17
    source, _ = schedule.assign(np.arange(n, dtype=np.uint64))
    # What the theorem allows: less than one sample after any n, less than two in any window.
    bound = 1 - 1 / max(2, 2 * len(weights) - 2)
    for index, share in enumerate(shares.values()):
        ahead = np.cumsum(source == index) - np.arange(1, n + 1) * float(share)
        ahead = np.append(0.0, ahead)
        assert np.abs(ahead).max() <= bound + 1e-9
        assert ahead.max() - ahead.min() <= 2 * bound + 1e-9  # over all windows


@settings(deadline=None, max_examples=50)
@given(weights=WEIGHTS, start=st.integers(0, 10**15))
def test_draws_of_a_source_are_numbered_one_after_another(weights, start):
    schedule = Schedule(shares_of(weights))
    source, draw = schedule.assign(np.arange(start, start + 300, dtype=np.uint64))
    for index in range(len(weights)):
        mine = draw[source == index].astype(np.int64)
        assert (np.diff(mine) == 1).all()
        before = schedule.drawn(start)[f"s{index}"]
        assert len(mine) == 0 or mine[0] == before


def test_llama_is_table_1():
    shares = parse_shares("llama")
    assert [float(share) * 100 for share in shares.values()] == [67, 15, 4.5, 4.5, 4.5, 2.5, 2]
    assert sum(shares.values()) == 1
    schedule = Schedule(shares)
    assert schedule.period == 200
    drawn = schedule.drawn(10_000_000)
    assert drawn == {name: int(Fraction(s) * 10_000_000) for name, s in LLAMA_SHARES.items()}


def test_shares_finer_than_the_period_are_rounded_to_it():
    shares = {"a": Fraction(1, 3) + Fraction(1, 10**9), "b": Fraction(2, 3) - Fraction(1, 10**9)}
    schedule = Schedule(shares)
    assert schedule.period == MAX_PERIOD
    assert schedule.drawn(MAX_PERIOD) == {"a": 33_333, "b": 66_667}
    tiny = {"a": Fraction(1, 10**9), "b": 1 - Fraction(1, 10**9)}
    assert Schedule(tiny).drawn(10 * MAX_PERIOD)["a"] >= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=0.5,b=0.4", "sum to 0.9, not to 1"),
        ("a=0.5,b=0.6", "sum to 1.1, not to 1"),
        ("a=1.5,b=-0.5", "a new name and a positive share"),
        ("a=0.5,a=0.5", "a new name and a positive share"),
        ("a=half,b=0.5", "'a=half' is not NAME=SHARE"),
        ("a", "'a' is not NAME=SHARE"),
        ("a=1,", "is not NAME=SHARE"),
        ("a=1/0", "is not NAME=SHARE"),
    ],
)
def test_bad_shares(text, message):
    with pytest.raises(UserError, match=message):
        parse_shares(text)


def test_fractions_are_exact():
    assert parse_shares("a=1/3,b=2/3") == {"a": Fraction(1, 3), "b": Fraction(2, 3)}
    assert sum(parse_shares(",".join(f"s{i}=0.1" for i in range(10))).values()) == 1
