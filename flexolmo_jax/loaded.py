"""A run, anchor or model in memory, ready to use: `flexolmo_jax.load(PATH)`."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flexolmo_jax.artifact import Artifact, open_artifact
from flexolmo_jax.config import MeshConfig, ModelConfig
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.generate import Decoder, Sampling, generate
from flexolmo_jax.model import Choices, Params, forward, logical_axes
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.runtime.sharding import batch_ways, make_mesh, parameter_sharding


@dataclass(frozen=True)
class LoadedModel:
    """Weights with what is needed to use them. Experts are switched by name:
    `without=("code",)`."""

    artifact: Artifact
    params: Params
    mesh: Mesh | None = None  # that the weights are spread over; None: they lie on one device

    @property
    def config(self) -> ModelConfig:
        return self.artifact.config

    @property
    def experts(self) -> tuple[str, ...]:
        """Names; "anchor" first."""
        return self.artifact.experts

    @property
    def tokenizer(self) -> Tokenizer:
        return self.artifact.tokenizer

    def logits(
        self, ids: np.ndarray, without: Sequence[str] = (), active: int | None = None
    ) -> np.ndarray:
        """int [B, T] -> float32 [B, T, V]. Each of the B sequences is one document.

        Raises UserError for an expert that is not there, for excluding the anchor or every expert,
        and for `active` above what is allowed.
        """
        k, allowed = self.selection(without, active)
        ids = np.asarray(ids, np.int32)
        if ids.ndim != 2:
            raise UserError(f"ids have shape {ids.shape}; expected [batch, time]")
        self.check_batch(len(ids))
        return np.asarray(_forward(self.config, k, self.mesh)(self.params, ids, allowed))

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        *,
        without: Sequence[str] = (),
        active: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        on_token: Callable[[int, np.ndarray], None] | None = None,
    ) -> list[str] | list[list[int]]:
        """Completions only, of the kind the prompts are (strings or lists of ids). Greedy unless a
        temperature is given."""
        k, allowed = self.selection(without, active)
        self.check_batch(len(prompts))
        of_text = all(isinstance(prompt, str) for prompt in prompts)
        for number, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                _check_unicode(number, prompt)
        ids = [
            self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            for prompt in prompts
        ]
        tokenizer = self.tokenizer
        decoder = Decoder(self.config, self.params, tokenizer.vocab_size, tokenizer.eos_id)
        choices = Choices(k, jnp.asarray(allowed), mesh=self.mesh)
        sampling = Sampling(temperature, top_k, top_p, seed)
        completions = generate(decoder, ids, max_new_tokens, choices, sampling, on_token)
        return [tokenizer.decode(ids) for ids in completions] if of_text else completions

    def check_batch(self, size: int) -> None:
        """Raises UserError where a batch of this size does not divide over the mesh."""
        if self.mesh is not None and size % (ways := batch_ways(self.mesh)):
            raise UserError(
                f"{size} sequences do not divide over {ways} devices of the mesh's data x fsdp x"
                " expert; give a multiple, or use tensor alone"
            )

    def selection(
        self, without: Sequence[str] = (), active: int | None = None
    ) -> tuple[int, np.ndarray]:
        """(experts a token uses, bool [E] of the experts it may choose from).

        The stored number of active experts shrinks to what is allowed; a number asked for does not.
        """
        return select_experts(self.artifact, without, active)


def load(path: str | Path, which: str = "last", mesh: MeshConfig | None = None) -> LoadedModel:
    """Loads a run (`which`: its last or best checkpoint, or a step), a published anchor or a merged
    model.

    `mesh`: the devices to spread its weights over, for a model that one does not hold. The tensor
    axis alone suits generation best: every device reads its own part of every weight, and nothing
    is gathered. Raises UserError for a mesh that the devices do not fill.
    """
    artifact = open_artifact(path)
    if mesh is None:
        return LoadedModel(artifact, artifact.params(which))
    where = make_mesh(mesh)
    axes = flatten(logical_axes(artifact.config, pair=artifact.is_pair))
    return LoadedModel(
        artifact,
        artifact.params(which, lambda path, shape: parameter_sharding(where, axes[path], shape)),
        where,
    )


def _check_unicode(number: int, prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # as bytes of a command line that are no UTF-8
        raise UserError(
            f"prompt {number}: character {error.start} is not Unicode; give the prompt in UTF-8"
        ) from None


def select_experts(
    artifact: Artifact, without: Sequence[str], active: int | None
) -> tuple[int, np.ndarray]:
    """See `LoadedModel.selection`."""
    artifact.check_experts(without)
    allowed = np.array([name not in without for name in artifact.experts])
    if len(artifact.experts) > 1 and allowed.sum() == 1:
        raise UserError(
            f"every expert of {artifact.path} is excluded; what is left is the anchor: use the"
            " anchor itself"
        )
    stored = len(artifact.experts) if artifact.is_pair else artifact.config.n_active
    if active is not None and not 1 <= active <= allowed.sum():
        raise UserError(
            f"--active is {active}; expected 1 to {allowed.sum()}, the number of experts that may"
            " be chosen"
        )
    return active or min(stored, int(allowed.sum())), allowed


@functools.lru_cache
def _forward(config: ModelConfig, active: int, mesh: Mesh | None) -> Callable[..., jax.Array]:
    def logits(params: Params, ids: jax.Array, allowed: jax.Array) -> jax.Array:
        return forward(
            config, params, jnp.asarray(ids), active=active, allowed=allowed, mesh=mesh
        ).logits

    return jax.jit(logits)
