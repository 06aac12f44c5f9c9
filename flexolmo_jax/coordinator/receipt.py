"""The receipt for an owner who leaves, which anybody can check against a model.

    receipt.json   the leavers' whole manifests and signatures; digests and sketches of their
                   weights; who stays; how exact the opt-out is
    receipt.sig    optional: the coordinator's Ed25519 signature over the receipt's bytes

A model still holds an expert that left if one of its experts is a copy of it, or nearly one
(sketch.py). Two equal matrices prove nothing: a matrix that training did not change is the anchor's
in every expert.
"""

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from flexolmo_jax.artifact import Artifact, read_sealed
from flexolmo_jax.description import Digest, Name, Sketch, Text
from flexolmo_jax.errors import UserError
from flexolmo_jax.integrity import manifest_of, tensors_of
from flexolmo_jax.storage import verified
from flexolmo_jax.storage.paths import reason
from flexolmo_jax.storage.untrusted import conform

from .composition import Composition, Member
from .objects import expert_key, sketch_claim, sketches_of
from .sketch import agree, decoded, encoded, is_copy
from .store import Store

FORMAT = 2
EXACT = "exact"
TUNED = (
    "router tuned with this expert present: retune from the contributed rows without its proxies"
    " (flexolmo tune)"
)


@dataclass(frozen=True)
class Removed:
    """An expert that left."""

    name: Name
    manifest: dict[str, Any] | None  # None: of an imported model
    signature: Text | None
    digests: Annotated[tuple[Digest, ...], Field(min_length=1, max_length=1 << 16)]
    sketch: Sketch


@dataclass(frozen=True)
class Remaining:
    """An expert that stays, with the digest of its manifest."""

    name: Name
    manifest: Digest | None


@dataclass(frozen=True)
class Receipt:
    """The schema of `receipt.json`."""

    format: Literal[2]
    date: Text
    anchor: Digest | None
    removed: Annotated[tuple[Removed, ...], Field(min_length=1)]
    remaining: tuple[Remaining, ...]
    grade: Text
    # names only: the owner need not know the coordinator's paths
    models_that_still_hold_it: tuple[Text, ...]
    store_still_holds_it: bool
    sha256: Digest


def make_receipt(
    before: Artifact, after: Composition, names: Iterable[str], store: Store
) -> dict[str, Any]:
    """The receipt of these experts leaving the model `before`, which then is `after`.

    Raises UserError where an expert that stays is a copy of one that leaves.
    """
    ensure_sketches(before)
    names = set(names)
    leaving = [member for member in before.members if member["name"] in names]
    sketches = {member["name"]: _sketch(before, member) for member in before.members}
    for member in after.members:
        for gone in leaving:
            name, other = member["name"], gone["name"]
            is_same = digests_of(member) == digests_of(gone)
            if is_same or is_copy(sketches[name], sketches[other]):
                raise UserError(
                    f"the expert {name!r} is a copy of {other!r}, or nearly one; opt it out too"
                    f" (--expert {name})"
                )
    digests = set[str]().union(*map(digests_of, leaving))
    holders = {
        model.path.name
        for model in [before, *store.models()]
        if any(digests & digests_of(member) for member in model.members)
    }
    remaining = [{"name": m["name"], "manifest": manifest_digest(m)} for m in after.members]
    in_store = any(store.holds(expert_key(tensors_of(member))) for member in leaving)
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "anchor": before.fingerprint,
        "removed": [_removed(member, sketches[member["name"]]) for member in leaving],
        "remaining": remaining,
        "grade": grade(names, after.tuning.traces),
        "models_that_still_hold_it": sorted(holders),
        "store_still_holds_it": in_store,
    }


def _removed(member: Member, sketch: np.ndarray) -> dict[str, Any]:
    return {
        "name": member["name"],
        "manifest": manifest_of(member),
        "signature": member.get("signature"),
        "digests": sorted(digests_of(member)),
        "sketch": encoded(sketch),
    }


def digests_of(member: Member) -> set[str]:
    """The digests of an expert's matrices and rows.

    Biases are left out: a bias is one number, which two experts may share by accident.
    """
    tensors = tensors_of(member)
    return {entry["sha256"] for name, entry in tensors.items() if not name.endswith(".bias")}


def manifest_digest(member: Member) -> str | None:
    """The SHA-256 of a member's manifest, where it has one."""
    manifest = manifest_of(member)
    return manifest["sha256"] if manifest else member["manifest"]


def _sketch(model: Artifact, member: Member) -> np.ndarray:
    """The sketch of what training changed in an expert.

    It comes from the description, which `ensure_sketches` has checked. An imported model has none
    there, so its weights are read.
    """
    if "sketch" in member:
        return decoded(member["sketch"], model.config)
    weights, index = model.path / "weights", model.experts.index(member["name"])
    return sketches_of(weights, model.config, index) - sketches_of(weights, model.config)


def ensure_sketches(model: Artifact) -> None:
    """Checks a model's sketches as `check_sketches` does, unless it was done before."""
    verified.once(model.path, sketch_claim(model), lambda: check_sketches(model))


def check_sketches(model: Artifact) -> None:
    """Compares a model's sketches with its weights, of which it reads all matrices.

    Raises UserError for a sketch of other weights.
    """
    kept = [(index, member) for index, member in enumerate(model.members, 1) if "sketch" in member]
    if not kept:
        return
    anchor = sketches_of(model.path / "weights", model.config)
    for index, member in kept:
        try:
            told = decoded(member["sketch"], model.config)
        except ValueError as error:
            raise UserError(
                f"{model.path}: the sketch of {member['name']!r} is damaged: {error!s:.100}; do not"
                " use it"
            ) from None
        if not agree(told, sketches_of(model.path / "weights", model.config, index) - anchor):
            raise UserError(
                f"{model.path}: the sketch of {member['name']!r} is not that of its weights; do not"
                " use it"
            )


def grade(names: Iterable[str], tuned_with: Iterable[str]) -> str:
    """How exact an opt-out is: not, if the router was tuned with an expert that left."""
    return TUNED if set(names) & set(tuned_with) else EXACT


def read_receipt(path: Path) -> dict[str, Any]:
    """The receipt in a file, of this version.

    Raises UserError where it is missing, damaged or of another version.
    """
    try:
        receipt = read_sealed(path)
        if receipt.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {receipt.get('format')!r:.20}; this version reads {FORMAT};"
                " have it written anew"
            )
        conform(Receipt, receipt)
        return receipt
    except OSError as error:
        raise UserError(f"cannot read the receipt {path}: {reason(error)}") from None
    except ValueError as error:
        raise UserError(
            f"the receipt {path} is damaged ({type(error).__name__}: {error!s:.120})"
        ) from None
