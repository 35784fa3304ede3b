import re
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
    # The theorem's bound: less than one sample after any n, less than two in any window.
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
        ("a=0.5,,b=0.5", "'' is not NAME=SHARE; write llama, or a list with commas"),
        ("", "'' is not NAME=SHARE"),
        ("3:2:1", "'3:2:1' is not NAME=SHARE"),
        ("a=0.5 b=0.5", "'a=0.5 b=0.5' is not NAME=SHARE"),
        ("web=0,7", "a positive share"),
        ("a=nan,b=1", "a positive share"),
        ("a=inf,b=1", "a positive share"),
        ("a=1e400,b=1", "a positive share .from 1e-12 to 1e12"),
        ("a=1e999999999,b=1", "a positive share"),
        ("a=1e-999999999,b=1", "a positive share"),
        ("a=-0,b=1", "a positive share"),
        ("a=0/7,b=1", "a positive share"),
        ("a=-3,b=4", "a positive share"),
        ("a=0.5,a=0.5", "'a=0.5' must have a new name .*the name occurs twice"),
        ("web/*.jsonl=0.5,b=0.5", r"'web/\*.jsonl' is a path, but shares need names"),
        ("gs://x=0.5,b=0.5", "is not NAME=SHARE"),
        ("a=0.3333,b=0.6666", "sum to 0.9999, not to 1; write shares that do"),
        ("a=0.5,b=0.499998", "sum to 0.999998, not to 1"),
        ("a=0.5,b=0.500002", "sum to 1.000002, not to 1"),
        ("a=0.333333,b=0.333333", "sum to 0.666666, not to 1"),
        ("a=70%,b=20%", "sum to 90%, not to 100%"),
        ("a=150%,b=50%", "sum to 200%, not to 100%"),
        ("a=2", "sum to 2, not to 1"),
        ("a=" + "9" * 5000 + "/3,b=1", r"'a=9{75}\.\.\.' is not NAME=SHARE"),
        ("a=1/" + "9" * 4000 + ",b=1", r"'a=1/9{73}\.\.\.' must have .* a positive share"),
    ],
)
def test_bad_shares(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_shares(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        # Rounded results of arithmetic as Python prints them, such as 1 - 0.1 - 0.2.
        ("a=0.1,b=0.2,c=0.7000000000000001", ["1/10", "1/5", "7/10"]),
        ("a=0.1,b=0.2,c=0.7", ["1/10", "1/5", "7/10"]),
        ("a=0.30000000000000004,b=0.7", ["3/10", "7/10"]),
        ("a=0.333333,b=0.333333,c=0.333334", ["1/3", "1/3", "1/3"]),
        ("a=0.3333333,b=0.3333333,c=0.3333333", ["1/3", "1/3", "1/3"]),
        ("web=3,books=2,code=1", ["1/2", "1/3", "1/6"]),
        ("web:3,books:2,code:1", ["1/2", "1/3", "1/6"]),
        ("web 3, books 2, code 1", ["1/2", "1/3", "1/6"]),
        ("web = 3 ;\n books = 2 ;\n code = 1\n", ["1/2", "1/3", "1/6"]),
        ("web=3\nbooks=2\ncode=1", ["1/2", "1/3", "1/6"]),
        ("web=0.5,books=1.5", ["1/4", "3/4"]),
        ("web=70,books=30", ["7/10", "3/10"]),
        ("web=70%,books=30 %", ["7/10", "3/10"]),
        ("web=70%,books=0.3", ["7/10", "3/10"]),
        ("web=33.3333%,books=66.6667%", ["1/3", "2/3"]),
        ("web=1e3,books=1E3", ["1/2", "1/2"]),
        ("web=1,books=1", ["1/2", "1/2"]),
        ("web=1/3,books=2/3", ["1/3", "2/3"]),
        ("web=0.5,\n books=0.5,\n", ["1/2", "1/2"]),
        ("web=1", ["1"]),
        ("web=100%", ["1"]),
        ("web=.5,books=.5", ["1/2", "1/2"]),
    ],
)
def test_shares_as_people_write_them(text, shares):
    found = parse_shares(text)
    assert sum(found.values()) == 1
    assert all(re.fullmatch(r"[a-z]+", name) for name in found)
    for share, expected in zip(found.values(), shares, strict=True):
        assert abs(share - Fraction(expected)) < Fraction(1, 10**6)


def test_float_noise_is_gone_from_what_is_drawn():
    noisy = parse_shares("a=0.1,b=0.2,c=0.7000000000000001")
    assert Schedule(noisy, exact=True).drawn(10**6) == {"a": 10**5, "b": 2 * 10**5, "c": 7 * 10**5}


def test_llama_with_spaces():
    assert parse_shares(" llama\n") == parse_shares("llama")


def test_fractions_are_exact():
    assert parse_shares("a=1/3,b=2/3") == {"a": Fraction(1, 3), "b": Fraction(2, 3)}
    assert sum(parse_shares(",".join(f"s{i}=0.1" for i in range(10))).values()) == 1
