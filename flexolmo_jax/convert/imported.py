"""Writing a model from the tensors of another format: one at a time, in the order of our leaves."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from flexolmo_jax.artifact import Artifact, open_artifact, write_description
from flexolmo_jax.config import ModelConfig, to_dict
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.integrity import layouts, name_of_tensor
from flexolmo_jax.model import init_params
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.runtime.progress import bar, note
from flexolmo_jax.storage.files import new_directory
from flexolmo_jax.storage.weights import Layout, Writer

from .huggingface import Entry
from .identity import TERMS, Identify, Identity, Tensors, by_expert, described


class Values(Protocol):
    """The values of one entry of the key table, wherever they are."""

    @property
    def entry(self) -> Entry: ...

    def read(self) -> np.ndarray:
        """The values, laid out as our leaf has them."""
        ...


class Source(NamedTuple):
    """A model in another format."""

    config: ModelConfig
    architecture: str  # transformers' class
    tokenizer: Tokenizer | None
    dtype: str
    values: Mapping[str, Sequence[Values]]  # of each leaf, by its path, in the order of its index


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, where: Path) -> None:
    """Raises UserError where the tokenizer has ids that the model does not."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{where} has a tokenizer of {tokenizer.vocab_size} tokens and vocab_size"
            f" {config.vocab_size}; expected no more tokens than that; check that they belong"
            " together"
        )


def write_model(out: Path, source: Source, identify: Identify) -> Artifact:
    """Writes the model, whose experts behind the anchor are those that `identify` says."""
    config, tokenizer = source.config, source.tokenizer
    shapes = flatten(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    stored = {path: {"dtype": source.dtype, "shape": list(a.shape)} for path, a in shapes.items()}
    with new_directory(out) as directory:
        if tokenizer:
            tokenizer.save(directory)
        target = layouts(config, stored)
        anchor, tensors = _write(directory / "weights", target, source.values, config.n_experts)
        members = [_member(*each) for each in zip(identify(tensors), tensors, strict=True)]
        experts = ["anchor", *(member["name"] for member in members)]
        description = {
            "kind": "model",
            "model": to_dict(config),
            "experts": experts,
            "members": members,
            "anchor": {"tensors": anchor},
            "fingerprint": None,  # until it is published
            "imported": source.architecture,
            **(tokenizer.digests if tokenizer else {}),
            "tensors": stored,
        }
        write_description(directory, description)
    if tokenizer and tokenizer.lost_bytes:
        note(
            f"the vocabulary cannot spell the bytes {tokenizer.lost_bytes.hex(' ')}; text loses"
            " them, and bits per byte count 8 for each"
        )
    size = sum(a.size for a in shapes.values())
    note(f"imported {out}: {size:,} parameters in {source.dtype}, experts {', '.join(experts)}")
    return open_artifact(out)


def _write(
    directory: Path,
    target: Mapping[str, Layout],
    tensors: Mapping[str, Sequence[Values]],
    experts: int,
) -> tuple[dict[str, Any], list[Tensors]]:
    """Writes the arrays; returns what a model's description says of the tensors of its anchor, and
    of each of its other experts."""
    anchor: dict[str, Any] = {}
    others: list[Tensors] = [{} for _ in range(experts)]
    total = sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in target.values())
    with bar("import", float(total), in_bytes=True) as advance, Writer(directory, target) as writer:
        for path, layout in target.items():
            of_anchor = hashlib.sha256()
            for index, values in _slices(layout, tensors.get(path, ())):
                writer.write_slice(path, index, values)
                for layer, expert, part in by_expert(path, index, values):
                    if expert == 0:
                        of_anchor.update(part.reshape(-1).view(np.uint8).data)
                    else:
                        others[expert][name_of_tensor(path, layer)] = described(part)
                advance(values.nbytes)
            shape = list(layout.shape)
            if path.startswith("experts/"):
                shape[1] = 1  # only the first expert is the anchor's
            anchor[path] = {"dtype": layout.dtype, "shape": shape, "sha256": of_anchor.hexdigest()}
    return anchor, others[1:]


def _member(who: Identity, tensors: Tensors) -> dict[str, Any]:
    return {
        **{field: getattr(who, field) for field in ("name", *TERMS)},
        "router_bias": False,
        "privacy": "none",
        "manifest": None,
        "tensors": tensors,
        "training": {"imported": True},
    }


def _slices(
    layout: Layout, located: Sequence[Values]
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """A leaf in contiguous parts: matrices one by one, vectors of all layers at once.

    Zeros where the checkpoint has none, as a dense model has no router.
    """
    if not located:
        yield (), np.zeros(layout.shape, layout.dtype)
    elif located[0].entry.transpose or not located[0].entry.index:
        for one in located:
            yield one.entry.index, one.read()
    else:
        yield (), np.stack([one.read() for one in located]).reshape(layout.shape)
