"""Token ids that come from outside: what they have to be, wherever they come in."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime.progress import note_once

_SHAPES = {1: "[time]", 2: "[batch, time]"}


def checked_ids(ids: Any, vocab_size: int, what: str, ndim: int = 1, first: int = 0) -> np.ndarray:
    """The ids as int32.

    Args:
        ids: an array of NumPy or JAX, or sequences of integers.
        vocab_size: they are less.
        what: names them in messages.
        first: the number of the first one in what they are a part of.

    Raises:
        UserError: another number of dimensions, nothing, anything but integers, or ids that the
            vocabulary does not have; the first of these is told with its place.
    """
    has_kind = hasattr(ids, "dtype") and ids.dtype != object
    array = np.asarray(ids) if has_kind else _of_sequences(ids, what)
    if array.dtype.kind not in "iuO":
        raise UserError(f"{what}: got {array.dtype} values, expected integers")
    if array.dtype.kind == "O" and (odd := [one for one in array.flat if type(one) is not int]):
        is_row = hasattr(odd[0], "__len__") and not isinstance(odd[0], str)
        expected = "rows of one length" if is_row else "integers"
        raise UserError(f"{what}: got {odd[0]!r:.40} among the ids, expected {expected}")
    if array.ndim != ndim or not array.size:
        got = "no tokens" if 0 in array.shape else f"ids of shape {array.shape}"
        raise UserError(f"{what}: got {got}, expected {_SHAPES[ndim]}, at least one token")
    if array.min() < 0 or array.max() >= vocab_size:
        place = np.argwhere((array < 0) | (array >= vocab_size))[0]
        at = ", ".join(str(first + int(i)) for i in place)
        raise UserError(
            f"{what}: got ids outside the vocabulary, expected 0 to {vocab_size - 1}; place {at}"
            f" has token {int(array[tuple(place)])}"
        )
    return array.astype(np.int32)


def _of_sequences(ids: Any, what: str) -> np.ndarray:
    """An array of Python's objects, so that nothing is cast on the way."""
    try:
        array = np.array(list(ids) if isinstance(ids, Iterator) else ids, object)
    except ValueError:  # some arrays that do not fit each other
        raise UserError(
            f"{what}: got rows of several lengths, expected rows of one length"
        ) from None
    for place, one in np.ndenumerate(array):
        if hasattr(one, "dtype") and one.ndim == 0:
            array[place] = one.item()
    return array


READS = "that the model reads (model.max_seq_len)"


def warn_of_length(length: int, longest: int, what: str, which: str = READS) -> None:
    """Says once, on stderr, that `what` is longer than what a model knows, if it is.

    `which` says what the `longest` tokens are.
    """
    if length > longest:
        note_once(
            f"warning: {what} longer than the {longest} tokens {which}; its figures for them mean"
            " little"
        )
