"""What the training loop is given. It knows nothing of FlexOlmo: a job is initial parameters, which
of them are trained, and what to train and evaluate them on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flexolmo_jax.artifact import Placement
from flexolmo_jax.config import ModelConfig, RunConfig
from flexolmo_jax.data.mixture import Batches
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.tokens import Source
from flexolmo_jax.model import Params


@dataclass(frozen=True)
class Job:
    """Everything the loop needs."""

    config: RunConfig
    model: ModelConfig
    # makes or reads the whole parameter tree, each tensor placed as told
    initial: Callable[[Placement], Params]
    # by path; the rest is frozen: no gradient, no optimiser state, not in checkpoints
    is_trained: Callable[[str], bool]
    experts: tuple[str, ...]  # names, the anchor's first
    tokenizer: Tokenizer
    batches: Batches
    heldout: dict[str, Source]
    # for each source of the mixture: (expert its tokens belong to, how much they count in the loss)
    contrast: tuple[tuple[int, float], ...] = ()
    # pair, router: {"base": path, "fingerprint": digest, ...}
    base: dict[str, Any] = field(default_factory=dict)
