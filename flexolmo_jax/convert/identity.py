"""Which expert is which in a Hugging Face checkpoint, whose tensors have numbers and no names.

An export notes in `config.json`, under `flexolmo_jax`, each expert's name, owner and terms, with a
digest of its tensors. An import believes a note where the digests are those of the tensors. In
others' checkpoints experts are found by comparing them with checkpoints of single experts.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from flexolmo_jax.artifact import Artifact
from flexolmo_jax.description import Digest, Name, Text, canonical_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.contribution import check_expert_name
from flexolmo_jax.integrity import MATRICES, manifest_of
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.untrusted import conform

KEY = "flexolmo_jax"  # of config.json
TERMS = ("owner", "domain", "licence", "expires")

Tensors = dict[str, dict[str, Any]]  # of one expert: dtype, shape and SHA-256 by our tensor's name
# from the tensors of all experts but the anchor to who they are
Identify = Callable[[Sequence[Tensors]], "list[Identity]"]


@dataclass(frozen=True)
class Identity:
    """What is said of an expert."""

    name: Name
    owner: Text = ""
    domain: Text = ""
    licence: Text = ""
    expires: Text | None = None


@dataclass(frozen=True)
class Noted(Identity):
    """An expert in the note of a `config.json`."""

    sha256: Digest | None = None  # of its tensors; None: nothing to compare with

    def of_any_weights(self) -> "Noted":
        """The same where weights were cast, whose digests are others."""
        return dataclasses.replace(self, sha256=None)


@dataclass(frozen=True)
class _Note:
    experts: Annotated[tuple[Noted, ...], Field(max_length=4095)]  # all but the anchor, in order
    anchor: Digest | None = None  # its fingerprint


def by_expert(
    path: str, index: tuple[int, ...], values: np.ndarray
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(layer, expert, its values) of a slice of a leaf: what is at `index` of the leaf at `path`.

    All of the trunk is the anchor's, expert 0.
    """
    if not path.startswith("experts/"):
        yield 0, 0, values
        return
    for rest in np.ndindex(values.shape[: 2 - len(index)]):
        layer, expert = (*index, *rest)
        yield layer, expert, np.ascontiguousarray(values[rest])


def described(values: np.ndarray) -> dict[str, Any]:
    digest = hashlib.sha256(values.reshape(-1).view(np.uint8).data).hexdigest()
    return {"dtype": str(values.dtype), "shape": list(values.shape), "sha256": digest}


def note_of(artifact: Artifact, experts: Sequence[Tensors]) -> dict[str, Any]:
    """The note of an export, whose experts but the anchor have these tensors; none of a dense one,
    which has no others."""
    if not experts:
        return {}
    members = {member["name"]: manifest_of(member) or member for member in artifact.members}
    noted = []
    for name, tensors in zip(artifact.experts[1:], experts, strict=True):
        said = {key: members.get(name, {}).get(key) for key in TERMS}
        terms = {key: value for key, value in said.items() if value}
        noted.append({"name": name, **terms, "sha256": _digest(tensors)})
    return {KEY: {"anchor": artifact.fingerprint, "experts": noted}}


def from_note(value: Any, where: Path, experts: int) -> tuple[Noted, ...]:
    """The experts of a note, if there is one. Raises UserError for one that cannot be right."""
    if value is None:
        return ()
    try:
        conform(_Note, value)
        noted = tuple(Noted(**one) for one in value["experts"])
        for one in noted:
            check_expert_name(one.name)
            if one.sha256 is None:
                raise UserError(f"{one.name} has no sha256")
    except (ValueError, UserError) as error:
        raise UserError(
            f"{where}: {KEY} is not what export-hf writes ({error!s:.200}); remove that key, or"
            " export again"
        ) from None
    if len(noted) != experts or len({one.name for one in noted}) != experts:
        raise UserError(
            f"{where}: {KEY} names {len(noted)} experts; expected {experts} beside the anchor, each"
            " with a name of its own; remove that key, or export again"
        )
    return noted


def named(names: Sequence[str], noted: Sequence[Noted], experts: int) -> Identify:
    """Experts of the given names, else of the note's, else expert1, expert2, ...

    Raises UserError for names that do not fit; `Identify` does for experts that are not those of
    the note, and for other names than the note's.
    """
    chosen = tuple(names) or tuple(f"expert{i}" for i in range(1, experts + 1))
    if len(chosen) != experts or len(set(chosen)) != len(chosen):
        raise UserError(
            f"--names are {', '.join(chosen)}; expected {experts} beside the anchor, each a name of"
            " its own"
        )
    for name in chosen:
        check_expert_name(name)

    def identify(found: Sequence[Tensors]) -> list[Identity]:
        if not noted:
            if names:
                note("the names are as given: nothing in the checkpoint says which expert is which")
            return [Identity(name) for name in chosen]
        left = list(noted)
        who: list[Identity] = []
        for i, tensors in enumerate(found, 1):
            one = next((one for one in left if one.sha256 in (None, _digest(tensors))), None)
            if one is None and not names:
                raise UserError(
                    f"expert {i} is none of those that config.json names"
                    f" ({', '.join(one.name for one in noted)}): its weights are others; name the"
                    " experts with --names"
                )
            if one is None:
                note(f"expert {i} is none of those that config.json names; its name is as given")
                who.append(Identity(chosen[i - 1]))
                continue
            left.remove(one)
            if names and one.name != chosen[i - 1]:
                raise UserError(
                    f"--names call expert {i} {chosen[i - 1]!r}; by its digest it is {one.name!r}"
                    " of config.json; leave out --names"
                )
            who.append(one)
        return who

    return identify


def matched(singles: Mapping[str, Tensors], experts: int) -> Identify:
    """Experts of the names of single ones with the same matrices; the others are expert1, ...

    Router rows may differ: they are trained again in mixtures. Raises UserError for names that do
    not fit; `Identify` does for a single expert that is none or several of the experts.
    """
    for name in singles:
        check_expert_name(name)
    wanted = {name: _digest(_matrices(tensors)) for name, tensors in singles.items()}

    def identify(found: Sequence[Tensors]) -> list[Identity]:
        digests = [_digest(_matrices(tensors)) for tensors in found]
        names = [f"expert{i}" for i in range(1, experts + 1)]
        for name, digest in wanted.items():
            places = [i for i, each in enumerate(digests) if each == digest]
            if len(places) != 1:
                raise UserError(
                    f"--match {name}: its matrices are those of {len(places)} of the {experts}"
                    " experts; expected one; check that both checkpoints are whole, of one dtype,"
                    " and that no expert is there twice"
                )
            names[places[0]] = name
        if len(set(names)) != len(names):
            raise UserError(
                f"--match gives the experts the names {', '.join(names)}; expected different ones"
            )
        if unknown := [name for name in names if name not in singles]:
            note(
                f"matched by digest: {', '.join(singles)}; no given checkpoint holds the others:"
                f" {', '.join(unknown)}"
            )
        return [Identity(name) for name in names]

    return identify


def _matrices(tensors: Tensors) -> Tensors:
    return {name: entry for name, entry in tensors.items() if name.endswith(MATRICES)}


def _digest(tensors: Tensors) -> str:
    return hashlib.sha256(canonical_json(tensors).encode()).hexdigest()
