"""When an expert is a copy of another: exactly where the bounds lie."""

import numpy as np
import pytest

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.coordinator.sketch import NEAR, decoded, encoded, is_copy

OTHER = np.ones((6, 32))  # what training changed, of 2 layers


@pytest.mark.parametrize(("part", "copied"), [(NEAR - 0.01, True), (NEAR + 0.01, False)])
def test_a_copy_is_nearer_than_a_quarter_of_the_way_from_the_anchor(part, copied):
    assert NEAR == 0.25
    for sign in (1, -1):
        assert is_copy(OTHER * (1 + sign * part), OTHER) == copied
        assert is_copy(1000 * OTHER * (1 + sign * part), 1000 * OTHER) == copied


@pytest.mark.parametrize(("equal", "copied"), [(3, False), (4, True), (6, True)])
def test_more_than_half_of_the_matrices_decide(equal, copied):
    expert = -OTHER
    expert[:equal] = OTHER[:equal]
    assert is_copy(expert, OTHER) == copied


def test_matrices_that_training_left_alone_say_nothing():
    other = OTHER.copy()
    other[:4] = 0
    assert is_copy(other, other)
    mine = other.copy()
    mine[4:] = -1
    assert not is_copy(mine, other)
    assert not is_copy(np.zeros((6, 32)), np.zeros((6, 32)))


def test_a_few_changed_entries_do_not_hide_a_copy_and_another_shape_is_none():
    expert = OTHER.copy()
    expert[:, :15] = 1e30
    assert is_copy(expert, OTHER)
    expert[:, :17] = 1e30
    assert not is_copy(expert, OTHER)
    assert not is_copy(OTHER[:3], OTHER)


def test_a_sketch_that_encoded_did_not_write_is_refused():
    config = ModelConfig(n_layers=2, d_model=32)
    assert decoded(encoded(OTHER), config).tolist() == OTHER.tolist()
    bad = np.full((6, 32), np.nan)
    for text in (
        encoded(OTHER[:5]),
        encoded(np.ones((6, 33))),
        encoded(np.ones((6, 31))),
        "",
        "AAA",
        encoded(bad),
    ):
        with pytest.raises(ValueError, match=r"sketch|padding|buffer"):
            decoded(text, config)
