"""Token ids from outside: integers of the vocabulary in the right shape, or one line."""

import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.data.ids import checked_ids, warn_of_length
from flexolmo_jax.errors import UserError


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2, 9],
        (1, 2, 9),
        iter([1, 2, 9]),
        np.array([1, 2, 9]),
        np.array([1, 2, 9], ">u2"),
        np.array([1, 2, 9], np.uint64),
        np.array([1, 2, 9], object),
        jnp.array([1, 2, 9]),
        [np.int64(1), np.uint8(2), jnp.int32(9)],
    ],
)
def test_integers_of_every_kind_are_taken(ids):
    checked = checked_ids(ids, 10, "ids")
    assert checked.dtype == np.int32 and checked.tolist() == [1, 2, 9]


@pytest.mark.parametrize("ids", [[[1, 2], [3, 4]], [np.array([1, 2]), jnp.array([3, 4])]])
def test_rows_are_taken_as_lists_and_arrays(ids):
    assert checked_ids(ids, 10, "ids", ndim=2).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ([1, 2.0], "got 2.0 among the ids, expected integers"),
        ([1, True], "got True among the ids"),
        ([1, np.True_], "got True among the ids"),
        ([1, "2"], "got '2' among the ids"),
        ("12", "got '12' among the ids"),
        (None, "got None among the ids"),
        ([1, None], "got None among the ids"),
        (np.array([1.0, 2.0]), "got float64 values, expected integers"),
        (jnp.array([1.0]), "got float32 values"),
        (np.array([True]), "got bool values"),
        (np.array(["1"]), "got <U1 values"),
        (5, r"got ids of shape \(\), expected \[time\]"),
        ([[1, 2]], r"got ids of shape \(1, 2\)"),
        (np.ones((1, 1, 1), int), r"got ids of shape \(1, 1, 1\)"),
        ([[1, 2], [3]], r"got \[1, 2\] among the ids, expected rows of one length"),
        ([np.zeros((2, 3)), np.zeros((2, 4))], "expected rows of one length"),
        ([], "got no tokens"),
        (np.zeros(0, int), "got no tokens"),
        ([3, 10], r"outside the vocabulary, expected 0 to 9; place 1 has token 10$"),
        ([3, 1, -1], "place 2 has token -1"),
        ([2**70], f"place 0 has token {2**70}"),
        (np.array([2**63 + 1], np.uint64), f"place 0 has token {2**63 + 1}"),
        (np.array([2**32], np.int64), f"place 0 has token {2**32}"),
    ],
)
def test_everything_else_is_told_in_one_line(ids, told):
    with pytest.raises(UserError, match=f"^ids: .*{told}"):
        checked_ids(ids, 10, "ids")


def test_the_place_is_that_in_the_whole():
    with pytest.raises(UserError, match="place 1, 2 has token 77"):
        checked_ids([[1, 2, 3], [4, 5, 77]], 10, "ids", ndim=2)
    with pytest.raises(UserError, match="place 1002 has token 77"):
        checked_ids([1, 2, 77], 10, "ids", first=1000)


def test_what_is_too_long_is_told_once(capfd):
    for length in (64, 65, 66):
        warn_of_length(length, 64, "a test has records")
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "records longer than the 64 tokens" in told
