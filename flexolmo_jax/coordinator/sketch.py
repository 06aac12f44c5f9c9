"""Near copies of experts, found without their weights: a sketch of each matrix, compared by
distance.

    sketch(W)[b] = sum over j in bucket b of sign_j * (sum of W over the hidden units)_j

where j runs over the width of the model.

It is linear in W, so sketches of what training changed are differences of sketches; it does not
change with the order of hidden units, which an FFN's output does not depend on either; and a
changed entry moves one bucket, which leaves the median of all alone. An expert is a copy of another
where most of its matrices are nearer to the other's than a quarter of the way that the other has
gone from the anchor. Independent experts are about as far from each other as from the anchor.
Whoever scales hidden units up and down is not found.
"""

import base64

import numpy as np

from flexolmo_jax.config import ModelConfig

BUCKETS = 64  # or the model's width, where that is less
NEAR = 0.25
SEED = 2507_07024  # of the signs: the paper's arXiv number
ROWS = 256  # of a matrix that are widened to float32 at a time


def sketch_of(matrix: np.ndarray, leaf: str) -> np.ndarray:
    """float64 [buckets] of one matrix: [D, F] of "gate" and "up", [F, D] of "down"."""
    blocks = (
        matrix[start : start + ROWS].astype(np.float32) for start in range(0, len(matrix), ROWS)
    )
    if leaf == "down":
        sums = np.sum([block.sum(axis=0, dtype=np.float64) for block in blocks], axis=0)
    else:
        sums = np.concatenate([block.sum(axis=1, dtype=np.float64) for block in blocks])
    signed = sums * np.where(np.random.Philox(key=SEED).random_raw(len(sums)) & 1, 1.0, -1.0)
    return np.bincount(np.arange(len(sums)) % BUCKETS, weights=signed)


def encoded(sketches: np.ndarray) -> str:
    """[matrices, buckets] as it stands in JSON: float32, little-endian, in base 64."""
    largest = np.finfo(np.float32).max  # sums of the largest weights are larger
    return base64.b64encode(np.clip(sketches, -largest, largest).astype("<f4").tobytes()).decode()


def decoded(text: str, config: ModelConfig) -> np.ndarray:
    """float64 [3 L, buckets], of gate, up and down of each layer in turn. Raises ValueError for
    what `encoded` did not write."""
    values = np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float64)
    shape = 3 * config.n_layers, min(BUCKETS, config.d_model)
    if values.size != shape[0] * shape[1] or not np.isfinite(values).all():
        raise ValueError(
            f"a sketch has {values.size} numbers; expected {shape[0]} x {shape[1]} finite ones"
        )
    return values.reshape(shape)


def agree(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two sketches are of the same weights: one of both may have been rounded to float32,
    or summed in another order."""
    return one.shape == other.shape and bool(
        np.allclose(one, other, rtol=1e-3, atol=1e-4 * max(float(np.abs(other).max()), 1e-30))
    )


def is_copy(expert: np.ndarray, other: np.ndarray) -> bool:
    """Whether an expert is the other, or nearly: both are sketches of what training changed,
    [matrices, BUCKETS]."""
    if expert.shape != other.shape:
        return False
    changed, apart = (np.median(np.abs(each), axis=1) for each in (other, expert - other))
    touched = changed > 0  # a matrix that training left alone says nothing of who trained
    return (
        bool(touched.any())
        and np.count_nonzero(apart[touched] < NEAR * changed[touched]) > touched.sum() / 2
    )
