"""What an owner who leaves is given: which bytes are gone from a model, who still has them, and a check that anybody can run.

The receipt names tensors by their SHA-256: FFN matrices and router rows. (A bias is one number, which experts may share by accident.)
"""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.artifact import Artifact, open_artifact, read_sealed, sealed_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.files import write_text
from flexolmo_jax.storage.paths import reason

from .store import Store, expert_key
from .verify import RECEIPT, tensor_digests, verify_model

FORMAT = 1
EXACT = "exact"
TUNED = "router tuned with this expert present: retune from the contributed rows without its proxies (flexolmo tune)"


def digests_of(member: Mapping[str, Any]) -> set[str]:
    """Of an expert's matrices and rows."""
    return {entry["sha256"] for name, entry in member["tensors"].items() if not name.endswith(".bias")}


def make_receipt(
    before: Artifact, members: Sequence[Mapping[str, Any]], names: Sequence[str], tuned_with: Sequence[str], store: Store
) -> dict[str, Any]:
    """For a model that is about to lose experts; `members` are those that stay.

    Raises UserError where an expert that stays has the same weights: nothing would be taken out.
    """
    leaving = [member for member in before.description["members"] if member["name"] in names]
    removed = set[str]().union(*(digests_of(member) for member in leaving))
    for member in members:
        if removed & digests_of(member):
            raise UserError(
                f"the expert {member['name']!r} has the same weights as one that leaves; opt it out too (--expert {member['name']})"
            )
    holders = {
        str(model.path) for model in [before, *store.models()] if any(removed & digests_of(m) for m in model.description.get("members", ()))
    }
    keys = ("name", "owner", "domain", "licence", "manifest")
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "anchor": before.fingerprint,
        "removed": [{key: m[key] for key in keys} | {"digests": sorted(digests_of(m))} for m in leaving],
        "remaining": [{key: m[key] for key in ("name", "manifest")} for m in members],
        "grade": grade(names, tuned_with),
        "models_that_still_hold_it": sorted(holders),
        "store_that_still_holds_it": str(store.path) if any(store.holds(expert_key(m["tensors"])) for m in leaving) else None,
    }


def grade(names: Iterable[str], tuned_with: Iterable[str]) -> str:
    """Of an opt-out: whether experts of these names have left a trace in how the router was tuned."""
    return TUNED if set(names) & set(tuned_with) else EXACT


def write_receipt(directory: Path, receipt: Mapping[str, Any]) -> None:
    write_text(directory / RECEIPT, sealed_json(receipt))


def verify_receipt(path: Path, model_path: Path) -> dict[str, Any]:
    """Reads all of a model's bytes. The grade is that of this model: a router that was retuned without those who left has no trace of them.

    Raises UserError where it holds one of the removed tensors, or is not the merge without them.
    """
    try:
        receipt = read_sealed(path)
        if receipt["format"] != FORMAT:
            raise UserError(f"{path} has format {receipt['format']}; this version reads {FORMAT}; upgrade flexolmo-jax")
        removed = {digest for expert in receipt["removed"] for digest in expert["digests"]}
        remaining, anchor = receipt["remaining"], receipt["anchor"]
    except OSError as error:
        raise UserError(f"cannot read the receipt {path}: {reason(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"the receipt {path} is damaged ({type(error).__name__}: {error!s:.80})") from None
    model = open_artifact(model_path)
    if model.kind != "model":
        raise UserError(f"{model_path} is a {model.kind}; expected a merged model")
    if model.fingerprint != anchor:
        raise UserError(f"{model_path} stands on the anchor {model.fingerprint}; the receipt is of a model on {anchor}")
    for what, digest, _ in tensor_digests(model):
        if digest in removed:
            raise UserError(f"{model_path} still holds what the receipt says is removed: {what} ({digest[:16]})")
    for member in model.description["members"]:
        if removed & digests_of(member):
            raise UserError(f"{model_path} still names {member['name']!r}, which the receipt says is removed")
    members = [{"name": member["name"], "manifest": member["manifest"]} for member in model.description["members"]]
    if members != remaining:
        got, expected = (", ".join(m["name"] for m in each) or "none" for each in (members, remaining))
        raise UserError(f"{model_path} is made of other contributions ({got}) than the receipt says remain ({expected})")
    verify_model(model)
    names = [expert["name"] for expert in receipt["removed"]]
    now = grade(names, model.description.get("router", {}).get("tuned_with", ()))
    return {"path": str(model_path), "verified": True, "removed": names, "digests": len(removed), "grade": now}
