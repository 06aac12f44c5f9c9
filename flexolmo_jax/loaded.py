"""A run, anchor or model in memory, ready to use: `flexolmo_jax.load(PATH)`."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from jax.sharding import Mesh

from flexolmo_jax.artifact import Artifact, open_artifact, placement_on
from flexolmo_jax.config import MeshConfig, ModelConfig, expect
from flexolmo_jax.data.chat import Message
from flexolmo_jax.data.ids import checked_ids
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.generate import Decoder, Generator, Sampling
from flexolmo_jax.kernels import Kernels
from flexolmo_jax.model import Params, forward
from flexolmo_jax.model.sizes import KEPT, SHORTEST, rounded_up
from flexolmo_jax.runtime.sharding import batch_over, check_batch, make_mesh
from flexolmo_jax.storage.paths import path_of

DTYPES = ("bfloat16", "float32")  # that a model generates in


@dataclass(frozen=True)
class LoadedModel:
    """A model's weights with what is needed to use them.

    Experts are excluded by name, in each call: `without=("code",)`.
    """

    artifact: Artifact
    params: Params
    mesh: Mesh | None = None  # the devices that the weights are spread over; None: one device
    kernels: Kernels = "auto"  # that route tokens
    dtype: str | None = None  # that it generates in; None: that of the weights, see `Generator`

    @property
    def config(self) -> ModelConfig:
        return self.artifact.config

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts' names, "anchor" first."""
        return self.artifact.experts

    @property
    def tokenizer(self) -> Tokenizer:
        return self.artifact.tokenizer

    def logits(
        self, ids: Any, without: Sequence[str] = (), active: int | None = None
    ) -> np.ndarray:
        """int [B, T] -> float32 [B, T, V]. Each of the B sequences is one document.

        B and T are rounded up, so that few programs are compiled: logits differ in their last bits
        between sizes.

        Args:
            ids: token ids, an array or lists. Of more than the model was trained on, or reads, a
                warning is told.
            without: names of experts to exclude.
            active: experts per token; by default what the model was saved with.

        Raises:
            UserError: what `checked_ids` refuses; an expert that does not exist, excluding
                the anchor or every expert, or `active` above the number of experts that are left.
        """
        k, allowed = self.selection(without, active)
        ids = checked_ids(ids, self.config.vocab_size, "ids", ndim=2)
        self.artifact.warn_of_length(ids.shape[1], "ids are")
        self.check_batch(len(ids))
        B, T = ids.shape
        length = rounded_up(max(T, SHORTEST), self.config.max_seq_len)
        batch = batch_over(self.mesh, rounded_up(B)), length
        padded = np.zeros((2, *batch), np.int32)  # and the document of each token, 0 for padding
        padded[:, :B, :T] = ids, np.ones_like(ids)
        run = _forward(self.config, k, self.mesh, self.kernels, batch)
        return np.asarray(run(self.params, *padded, allowed))[:B, :T]

    def generate(  # noqa: PLR0913 - a model call
        self,
        prompts: Iterable[str] | Iterable[Sequence[int]],
        max_new_tokens: int = 128,
        *,
        without: Sequence[str] = (),
        active: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        on_token: Callable[[int, np.ndarray], Any] | None = None,
    ) -> list[str] | list[list[int]]:
        """The completions of the prompts, without the prompts: text for text, ids for ids.

        A text begins with the model's BOS, if its texts do; ids are taken as they are.
        The sampling values are those of `Sampling`; by default it is greedy. `without` and `active`
        are as in `logits`, `on_token` is as in `Generator.generate`. Raises UserError.
        """
        # a text's characters would be prompts, and what a tokenizer of transformers gives has keys
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            raise UserError(f"prompts are {prompts!r:.80}; expected a list, also of one")
        ids: list[Any] = list(prompts)
        are_texts = all(isinstance(prompt, str) for prompt in ids)
        k, allowed = self.selection(without, active)
        self.check_batch(len(ids))
        for number, prompt in enumerate(ids):
            if isinstance(prompt, str):
                _check_unicode(number, prompt)
                ids[number] = [*self.tokenizer.start_ids, *self.tokenizer.encode(prompt)]
        sampling = Sampling(temperature, top_k, top_p, seed)
        own = self.artifact.own_tokenizer
        ends = own.end_ids if own else ()
        completions = self.generator.generate(
            ids, max_new_tokens, (k, allowed), sampling, on_token, ends
        )
        if are_texts:
            return [self.tokenizer.decode(ids) for ids in completions]
        return completions

    def chat(  # noqa: PLR0913 - a model call
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 128,
        *,
        without: Sequence[str] = (),
        active: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        on_token: Callable[[int, np.ndarray], Any] | None = None,
    ) -> str:
        """The assistant's answer to messages, without special tokens.

        It ends with the assistant's turn, or after `max_new_tokens`. What a message spells stays
        text, special tokens too.

            model.chat([{"role": "user", "content": "Where is the mill?"}])

        Args:
            messages: each a role and a content, both text; the last is usually the user's.

        The rest is as in `generate`. Raises UserError where the model has no chat template, the
        template refuses the messages, and as `generate` does.
        """
        k, allowed = self.selection(without, active)
        self.check_batch(1)
        tokenizer, chat = self.tokenizer, self.tokenizer.chat
        if chat is None:
            raise UserError(
                f"{self.artifact.path} has no chat template: expected one of an instruct model that"
                " was imported with it; use generate"
            )
        ends = chat.end_ids(tokenizer)
        ids = chat.encode(tokenizer, messages)
        sampling = Sampling(temperature, top_k, top_p, seed)
        (answer,) = self.generator.generate(
            [ids], max_new_tokens, (k, allowed), sampling, on_token, ends
        )
        hidden = chat.special_ids(tokenizer)
        return tokenizer.decode(i for i in answer if i not in hidden)

    @functools.cached_property
    def generator(self) -> Generator:
        """What `generate` and `chat` run, and what those use who need more of it."""
        vocabulary, eos_id = self.config.vocab_size, -1
        if own := self.artifact.own_tokenizer:
            vocabulary, eos_id = own.vocab_size, own.eos_id
        decoder = Decoder(self.config, self.params, vocabulary, eos_id)
        return Generator(decoder, self.mesh, self.kernels, self.dtype)

    def check_batch(self, size: int) -> None:
        """Raises UserError if a batch of this size cannot be divided evenly over the mesh."""
        check_batch(self.mesh, size)

    def selection(
        self, without: Sequence[str] = (), active: int | None = None
    ) -> tuple[int, np.ndarray]:
        """Returns (experts a token uses, bool [E] of the experts it may choose from).

        The stored number of active experts shrinks if fewer experts are left. A number that was
        asked for does not: it raises UserError.
        """
        return select_experts(self.artifact, without, active)


def load(
    path: str | Path,
    which: str = "last",
    mesh: MeshConfig | None = None,
    kernels: Kernels = "auto",
    dtype: str | None = None,
    anchor: str | Path | None = None,
) -> LoadedModel:
    """Loads a run, a published anchor or a merged model.

    Args:
        which: a run's checkpoint: last, best, or a step.
        mesh: the devices to spread the weights over, for a model that is too large for one. For
            generation use the tensor axis only: every device then reads its own part of every
            weight, and nothing is gathered.
        kernels: that route tokens: the platform's own, "xla" or "pallas".
        dtype: that it generates in, "bfloat16" or "float32"; by default that of the weights, on a
            CPU float32. Logits are always computed in float32.
        anchor: where the anchor of a pair's run lies, if it is neither where it was nor beside the
            run as it was; of a router's run, the model.

    Raises:
        UserError: nothing to load, another anchor, damaged files, a mesh that does not fit the
            devices, or kernels or a dtype that there are not.
    """
    known = get_args(Kernels)
    expect(kernels in known, "kernels", kernels, f"one of {', '.join(known)}")
    expect(dtype is None or dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
    artifact = open_artifact(path, None if anchor is None else path_of(anchor))
    devices = None if mesh is None else make_mesh(mesh)
    placement = placement_on(devices, artifact.config, pair=artifact.is_pair)
    return LoadedModel(artifact, artifact.params(which, placement), devices, kernels, dtype)


def _check_unicode(number: int, prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # such as a command line that is not in UTF-8
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
            f"every expert of {artifact.path} is excluded, and only the anchor is left; use the"
            " anchor itself"
        )
    stored = len(artifact.experts) if artifact.is_pair else artifact.config.n_active
    is_number = isinstance(active, Integral) and 1 <= active <= allowed.sum()
    if active is not None and not is_number:
        raise UserError(
            f"--active is {active}; expected 1 to {allowed.sum()}, the number of experts that may"
            " be chosen"
        )
    return int(active or min(stored, allowed.sum())), allowed


@functools.lru_cache(KEPT)
def _forward(
    config: ModelConfig, active: int, mesh: Mesh | None, kernels: Kernels, batch: tuple[int, int]
) -> Callable[..., jax.Array]:
    """The logits of a batch of this size: a function of its own, which goes with its program."""

    def logits(
        params: Params, ids: jax.Array, segments: jax.Array, allowed: jax.Array
    ) -> jax.Array:
        how: dict[str, Any] = {"active": active, "mesh": mesh, "kernels": kernels}
        return forward(config, params, ids, segments, allowed=allowed, **how).logits

    return jax.jit(logits)
