"""Finding near copies of experts without their weights, by a sketch of each matrix.

    sketch(W)[b] = sum over j in bucket b of sign_j * (sum of W over the hidden units)_j

where j runs over the width of the model. The sketch has three properties:

- It is linear in W. So the sketch of what training changed is the difference of two sketches.
- It does not depend on the order of hidden units, as an FFN's output does not.
- A changed entry of W moves one bucket only, and so hardly the median over the buckets.

An expert is a copy of another where most of its matrices are near the other's: nearer than a
quarter of the distance between the other's and the anchor's. Independent experts are about as far
from each other as from the anchor. A copy whose hidden units were scaled up and down is not found.
"""

import base64

import numpy as np

from flexolmo_jax.config import ModelConfig

BUCKETS = 64  # or the model's width, where that is less
NEAR = 0.25  # of the other's distance to the anchor
SEED = 2507_07024  # of the signs: the paper's arXiv number
BLOCK = 256  # vectors of a matrix that are cast to float32 at a time


def sketch_of(matrix: np.ndarray, leaf: str) -> np.ndarray:
    """float64 [buckets] of one matrix: [D, F] of "gate" and "up", [F, D] of "down"."""
    starts = range(0, len(matrix), BLOCK)
    blocks = (matrix[start : start + BLOCK].astype(np.float32) for start in starts)
    if leaf == "down":
        sums = np.sum([block.sum(axis=0, dtype=np.float64) for block in blocks], axis=0)
    else:
        sums = np.concatenate([block.sum(axis=1, dtype=np.float64) for block in blocks])
    signed = sums * np.where(np.random.Philox(key=SEED).random_raw(len(sums)) & 1, 1.0, -1.0)
    return np.bincount(np.arange(len(sums)) % BUCKETS, weights=signed)


def encoded(sketches: np.ndarray) -> str:
    """Sketches [matrices, buckets] for JSON: float32, little-endian, in base 64."""
    largest = np.finfo(np.float32).max  # sums of the largest weights are larger
    return base64.b64encode(np.clip(sketches, -largest, largest).astype("<f4").tobytes()).decode()


def decoded(text: str, config: ModelConfig) -> np.ndarray:
    """float64 [3 L, buckets]: the sketches of gate, up and down of each layer in turn.

    Raises ValueError for text that `encoded` did not write.
    """
    values = np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float64)
    shape = 3 * config.n_layers, min(BUCKETS, config.d_model)
    if values.size != shape[0] * shape[1] or not np.isfinite(values).all():
        raise ValueError(
            f"a sketch has {values.size} numbers; expected {shape[0]} x {shape[1]} finite ones"
        )
    return values.reshape(shape)


def agree(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two sketches are of the same weights.

    They may differ a little: one may be rounded to float32, or summed in another order.
    """
    if one.shape != other.shape:
        return False
    atol = 1e-4 * max(float(np.abs(other).max()), 1e-30)
    return bool(np.allclose(one, other, rtol=1e-3, atol=atol))


def is_copy(expert: np.ndarray, other: np.ndarray) -> bool:
    """Whether an expert is a copy of the other, or nearly one.

    Both are sketches of what training changed, [matrices, buckets].
    """
    if expert.shape != other.shape:
        return False
    changed, apart = (np.median(np.abs(each), axis=1) for each in (other, expert - other))
    touched = changed > 0  # a matrix that training did not change tells nothing
    near = apart[touched] < NEAR * changed[touched]
    return bool(touched.any()) and np.count_nonzero(near) > touched.sum() / 2
