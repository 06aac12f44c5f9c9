"""What an owner who leaves is given: a receipt that anybody can check against a model.

    receipt.json   the leavers' manifests and signatures, whole; digests and sketches of their
                   weights; who stays; how exact the opt-out is
    receipt.sig    optional: the coordinator's Ed25519 signature over the receipt's bytes

A model holds an expert that has left where one of its experts is it, or nearly it (sketch.py).
Equal single matrices prove nothing: what training leaves alone is the anchor's in every expert.
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
from .objects import sketch_claim, sketches_of
from .sketch import agree, decoded, encoded, is_copy
from .store import Store, expert_key

FORMAT = 2
EXACT = "exact"
TUNED = (
    "router tuned with this expert present: retune from the contributed rows without its proxies"
    " (flexolmo tune)"
)


@dataclass(frozen=True)
class Removed:
    name: Name
    manifest: dict[str, Any] | None  # of an imported model: none
    signature: Text | None
    digests: Annotated[tuple[Digest, ...], Field(min_length=1, max_length=1 << 16)]
    sketch: Sketch


@dataclass(frozen=True)
class Remaining:
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
    # by name: where they lie is the coordinator's business
    models_that_still_hold_it: tuple[Text, ...]
    store_still_holds_it: bool
    sha256: Digest


def make_receipt(
    before: Artifact, after: Composition, names: Iterable[str], store: Store
) -> dict[str, Any]:
    """For a model that is about to lose experts. Raises UserError where an expert that stays is a
    copy of one that leaves."""
    ensure_sketches(before)
    names = set(names)
    leaving = [member for member in before.members if member["name"] in names]
    sketches = {member["name"]: _sketch(before, member) for member in before.members}
    for member in after.members:
        for gone in leaving:
            if digests_of(member) == digests_of(gone) or is_copy(
                sketches[member["name"]], sketches[gone["name"]]
            ):
                raise UserError(
                    f"the expert {member['name']!r} is {gone['name']!r}, or nearly; opt it out too"
                    f" (--expert {member['name']})"
                )
    digests = set[str]().union(*map(digests_of, leaving))
    holders = {
        m.path.name
        for m in [before, *store.models()]
        if any(digests & digests_of(member) for member in m.members)
    }
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "anchor": before.fingerprint,
        "removed": [_removed(member, sketches[member["name"]]) for member in leaving],
        "remaining": [
            {"name": member["name"], "manifest": manifest_digest(member)}
            for member in after.members
        ],
        "grade": grade(names, after.tuning.traces),
        "models_that_still_hold_it": sorted(holders),
        "store_still_holds_it": any(
            store.holds(expert_key(tensors_of(member))) for member in leaving
        ),
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
    """Of an expert's matrices and rows. (A bias is one number, which experts may share by
    accident.)"""
    return {
        entry["sha256"] for name, entry in tensors_of(member).items() if not name.endswith(".bias")
    }


def manifest_digest(member: Member) -> str | None:
    manifest = manifest_of(member)
    return manifest["sha256"] if manifest else member["manifest"]


def _sketch(model: Artifact, member: Member) -> np.ndarray:
    """What training changed, as `ensure_sketches` has checked it. Imported models have no sketch of
    it: their weights are read."""
    if "sketch" in member:
        return decoded(member["sketch"], model.config)
    index = model.experts.index(member["name"])
    return sketches_of(model.path / "weights", model.config, index) - sketches_of(
        model.path / "weights", model.config
    )


def ensure_sketches(model: Artifact) -> None:
    """Makes sure, once, that a model's sketches are those of its weights. Raises UserError."""
    verified.once(model.path, sketch_claim(model), lambda: check_sketches(model))


def check_sketches(model: Artifact) -> None:
    """Reads all matrices. Raises UserError for a sketch that is not that of the weights."""
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
    """Of an opt-out: whether experts of these names have left a trace in how the router was
    tuned."""
    return TUNED if set(names) & set(tuned_with) else EXACT


def read_receipt(path: Path) -> dict[str, Any]:
    """Raises UserError where there is none that can be used."""
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
