"""Linear classifiers of private text: two, each for the documents that it was not trained on."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Classifier(NamedTuple):
    """A linear classifier: the logit of a vector x is x @ coefficients + bias."""

    coefficients: np.ndarray  # [F]
    bias: float

    def logits(self, vectors: np.ndarray) -> np.ndarray:
        """[n, F] -> [n]: the logit of a vector is the same beside whichever others it stands."""
        # a product of matrices adds up in an order that depends on n
        return (vectors * self.coefficients).sum(axis=1) + self.bias


class Classifiers(NamedTuple):
    """Two classifiers, each trained on one half of the documents to judge the other half."""

    each: tuple[Classifier, Classifier]

    def logits(self, digests: Sequence[bytes], vectors: np.ndarray) -> np.ndarray:
        """Logits [n] of documents, above 0 where one seems private."""
        first, second = (one.logits(vectors) for one in self.each)
        return np.where([half(digest) for digest in digests], first, second)


def half(digest: bytes) -> int:
    """The half that a document is in, 0 or 1; other bytes decide what is held out."""
    return digest[-1] & 1
