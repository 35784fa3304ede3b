"""A run that is killed at random times ends with the losses, weights and moments of its twin."""

import pytest

from tests.faults.soak import soak


@pytest.mark.slow
def test_killed_and_resumed_bit_for_bit(tmp_path):
    """It gets two SIGKILLs, after about 10 and 20 steps."""
    sent, equal = soak("synthetic", tmp_path, kills=2, devices=1, steps=40, seed=778, fresh=False)
    assert sent.total() >= 2 and equal


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_many_kills(corpus, tmp_path, processes):
    sent, equal = soak(corpus, tmp_path, kills=4, processes=processes, seed=1)
    assert sent.total() >= 4 and equal
