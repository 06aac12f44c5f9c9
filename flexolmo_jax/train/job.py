"""What the training loop is given. It knows nothing of FlexOlmo: a job is what it stands on, the
first values of what it trains, and what to train and evaluate them on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flexolmo_jax.artifact import Artifact, Placement
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
    # by path; the rest is frozen: no gradient, no optimiser state, not in checkpoints
    is_trained: Callable[[str], bool]
    # makes or reads what is trained, each tensor placed as told, from what `load_base` returned;
    # only asked where there is no checkpoint
    initial: Callable[[Placement, Params], Params]
    experts: tuple[str, ...]  # names, the anchor's first
    tokenizer: Tokenizer
    batches: Batches
    heldout: dict[str, Source]
    # for each source of the mixture: (expert its tokens belong to, how much they count in the loss)
    contrast: tuple[tuple[int, float], ...] = ()
    # reads what the run stands on, with everything frozen in it; an anchor or joint run has none
    load_base: Callable[[Placement], Params] = lambda placement: {}
    # pair, router: {"base": path, "fingerprint": digest, ...}
    base: dict[str, Any] = field(default_factory=dict)
    # what `train.init` names
    init: Artifact | None = None
