"""`flexolmo verify`: recomputes every digest of what a directory holds, one shard at a time.

It takes a contribution, an anchor, a model, a store or prepared data. Of a model it also checks
what its members claim: each manifest is for this anchor, its digests are those of the expert's
tensors, and its signature is right. Earlier checks do not count, and nothing is written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax import integrity
from flexolmo_jax.artifact import DESCRIPTION, Artifact, open_artifact, sealed_json
from flexolmo_jax.config import MeshConfig
from flexolmo_jax.data.documents import INDEX_FILE
from flexolmo_jax.data.records import open_records
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.admission import admission, admit
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.contribution import MANIFEST, open_contribution, recorded
from flexolmo_jax.exchange.signature import ANY, Trust, check_signature
from flexolmo_jax.integrity import (
    RECEIPT,
    RECEIPT_SIGNATURE,
    anchor_tensors,
    check_model,
    manifest_of,
)
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.outputs import STORE_FILE
from flexolmo_jax.storage.paths import reason, takes_paths
from flexolmo_jax.storage.untrusted import read_bytes

from .objects import sketches_of
from .receipt import check_sketches, digests_of, grade, manifest_digest, read_receipt
from .sketch import decoded, is_copy
from .store import Store

SIGNATURE_LIMIT = 1 << 12  # bytes
# What a directory is, by the first of these files that it has. The reader of each kind refuses
# files that do not belong to it.
_KINDS = {
    MANIFEST: "contribution",
    DESCRIPTION: "artifact",
    STORE_FILE: "a store",
    INDEX_FILE: "prepared data",
}


@takes_paths
def verify(
    path: Path,
    anchor_path: Path | None = None,
    trust: Trust = ANY,
    public: Path | None = None,
    *,
    refuse: bool = False,
    mesh: MeshConfig | None = None,
) -> dict[str, Any]:
    """Checks a directory and returns what was checked.

    Args:
        path: a contribution, anchor, model, store or prepared data.
        anchor_path: a contribution or a model must have been made from this very anchor.
        trust: who may have signed a contribution, or the members of a model.
        public: held-out text for the admission report of a contribution.
        refuse: raise for the report's findings, which otherwise are warnings.
        mesh: the devices that the report's anchor and expert are spread over (default: one device).

    Raises:
        UserError: naming the first thing that is wrong.
    """
    kind = _kind(path)
    _check_asked(path, kind, anchor_path is not None, public is not None, refuse)
    if mesh and not public:
        raise UserError(
            "--mesh is for the admission report, which needs public text; give --public too"
        )
    anchor = open_anchor(anchor_path) if anchor_path else None
    if kind == "contribution":
        return _verify_contribution(path, anchor, trust, public, refuse, mesh)
    if kind == "artifact":
        return _verify_artifact(path, anchor, trust)
    _leave_out(path, kind, anchor, trust)
    told: dict[str, Any] = {"path": str(path), "kind": kind.removeprefix("a "), "verified": True}
    if kind == "a store":
        return told | {"objects": Store.existing(path).verify()}
    open_records(path, "train").check_digests()
    return told


def _kind(path: Path) -> str:
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a directory that flexolmo has made")
    return next((kind for file, kind in _KINDS.items() if (path / file).exists()), "contribution")


def _check_asked(path: Path, kind: str, anchor: bool, public: bool, refuse: bool) -> None:
    if refuse and not public:
        raise UserError(
            "there is nothing to refuse by: the admission report needs public text; give --public"
        )
    if public and kind != "contribution":
        raise UserError(
            f"{path} is not a contribution, and only contributions have an admission report; leave"
            " out --public"
        )
    if public and not anchor:
        raise UserError(
            "the admission report tries a contribution together with its anchor; give --anchor too"
        )


def _verify_artifact(path: Path, anchor: Artifact | None, trust: Trust) -> dict[str, Any]:
    artifact = open_artifact(path)
    if artifact.kind == "run":
        raise UserError(
            f"{path} is a run; expected a contribution, an anchor or a model (`flexolmo package` or"
            " `publish` makes one)"
        )
    if artifact.kind == "anchor":
        _leave_out(path, "an anchor", None, trust)
    _check_anchor(artifact, anchor)
    tensors = len(artifact.description["tensors"])
    told = {"path": str(path), "kind": artifact.kind, "verified": True, "tensors": tensors}
    if artifact.kind == "anchor":
        integrity.check(path, artifact.description, artifact.config)
        return told | {"anchor": artifact.fingerprint}
    return told | {"anchor": artifact.fingerprint, "members": verify_model(artifact, trust)}


def _leave_out(path: Path, kind: str, anchor: Artifact | None, trust: Trust) -> None:
    """Raises UserError where a check is asked for that this kind does not have.

    Leaving it out silently would look as if it had passed.
    """
    if trust.signed:
        raise UserError(f"{path} is {kind}, which nobody signs; leave out --signed and --trust")
    if anchor is not None:
        raise UserError(f"{path} is {kind}, which has no anchor; leave out --anchor")


def _verify_contribution(
    path: Path,
    anchor: Artifact | None,
    trust: Trust,
    public: Path | None,
    refuse: bool,
    mesh: MeshConfig | None,
) -> dict[str, Any]:
    contribution = open_contribution(path)
    signer = contribution.check(anchor, trust)
    report = {}
    if public and anchor:
        report = {"admission": admission(contribution, anchor, public, mesh=mesh)}
        _judge(path, report["admission"]["findings"], refuse)
    elif anchor:
        admit(contribution, anchor)  # as a merge does
    tensors = len(contribution.manifest["tensors"]) if report else contribution.check_tensors()
    return {
        "path": str(path),
        "kind": "contribution",
        "verified": True,
        "tensors": tensors,
        "anchor": contribution.fingerprint,
        "signed_by": signer,
        **report,
    }


def _judge(path: Path, findings: list[str], refuse: bool) -> None:
    if refuse and findings:
        raise UserError(f"{path} is not admitted: {'; '.join(findings)}")
    for finding in findings:
        note(f"warning: {path}: {finding}")


def _check_anchor(artifact: Artifact, anchor: Artifact | None) -> None:
    """Raises UserError unless the artifact is this anchor, or was made from it.

    Every digest is compared, not only the fingerprint.
    """
    if anchor is None:
        return
    if artifact.fingerprint != anchor.fingerprint:
        raise UserError(
            f"{artifact.path} was made from the anchor {artifact.fingerprint}; {anchor.path} is"
            f" {anchor.fingerprint}"
        )
    check_model(artifact.path, artifact.description["model"], anchor.description["model"])
    description, is_anchor = artifact.description, artifact.kind == "anchor"
    own = description["tensors"] if is_anchor else anchor_tensors(description)
    for path, entry in anchor.description["tensors"].items():
        if own.get(path) != entry:
            raise UserError(
                f"{artifact.path} names the fingerprint of {anchor.path} but has another {path}; do"
                " not use it"
            )


def verify_model(model: Artifact, trust: Trust = ANY) -> list[dict[str, Any]]:
    """Checks all of a model and returns who made each member.

    A member of an imported model, or of a model of format 1, has no manifest. It is refused if
    `trust` asks for signatures. Raises UserError naming the first file, tensor or claim that is not
    what was merged.
    """
    if (model.path / RECEIPT).exists():
        _check_own_receipt(model)
    integrity.check_config(model.path, model.description)
    members = []
    for member in model.members:
        signer = _check_member(model, member, trust)
        manifest = manifest_of(member)
        digest = manifest["sha256"] if manifest else None
        members.append({"name": member["name"], "manifest": digest, "signed_by": signer})
    integrity.check(model.path, model.description, model.config)
    check_sketches(model)
    return members


def _check_member(
    model: Artifact, member: Mapping[str, Any], trust: Trust
) -> dict[str, Any] | None:
    """Who signed the manifest of a member. Raises UserError as `verify_model` does."""
    where = f"{model.path}: the expert {member['name']!r}"
    manifest = manifest_of(member)
    if manifest is None:
        if trust.signed:
            raise UserError(
                f"{where} has no signed manifest; merge it again from a signed contribution"
            )
        return None
    claimed = recorded(model.path, manifest, member["signature"])
    if claimed.name != member["name"]:
        raise UserError(f"{where} has the manifest of {claimed.name!r}; do not use the model")
    signer = claimed.check_origin(model, trust)
    if claimed.expired:
        note(f"warning: the licence of {where} expired on {claimed.expired}")
    return signer


@takes_paths
def verify_receipt(path: Path, model_path: Path, trust: Trust = ANY) -> dict[str, Any]:
    """Checks a model against a receipt, and reads all of the model's bytes.

    The grade returned is that of this model: if its router was retuned without those who left, it
    has no trace of them. Raises UserError where the model holds a removed expert, is not the merge
    without them, or nobody trusted signed the receipt.
    """
    receipt = read_receipt(path)
    signer = _signer(path, receipt, trust)
    model = open_artifact(model_path)
    if model.kind != "model" or "anchor" not in model.description:
        raise UserError(f"{model_path} is a {model.kind}; expected a merged model")
    _check_claims(path, receipt, model)
    _check_weights(model, receipt)
    verify_model(model)
    names = [expert["name"] for expert in receipt["removed"]]
    now = grade(names, model.description.get("router", {}).get("tuned_with", ()))
    digests = sum(len(expert["digests"]) for expert in receipt["removed"])
    return {
        "path": str(model_path),
        "verified": True,
        "removed": names,
        "digests": digests,
        "grade": now,
        "signed_by": signer,
    }


def _check_own_receipt(model: Artifact) -> None:
    """Checks the receipt that lies in a model: it is of this model, and signed right if at all."""
    path = model.path / RECEIPT
    receipt = read_receipt(path)
    if (signature := _signature(path)) is not None:
        check_signature(sealed_json(receipt).encode(), signature, ANY, path)
    _check_claims(path, receipt, model)


def _signature(receipt: Path) -> bytes | None:
    path = receipt.with_name(RECEIPT_SIGNATURE)
    try:
        return read_bytes(path, SIGNATURE_LIMIT)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None


def _check_claims(path: Path, receipt: Mapping[str, Any], model: Artifact) -> None:
    """Checks what a receipt says of a model against the model's description."""
    if model.fingerprint != receipt["anchor"]:
        raise UserError(
            f"{model.path} was made from the anchor {model.fingerprint}; the receipt is for a model"
            f" made from {receipt['anchor']}"
        )
    _check_leavers(path, receipt)
    _check_members(model, receipt)


def _signer(path: Path, receipt: Mapping[str, Any], trust: Trust) -> dict[str, Any] | None:
    signed = _signature(path)
    expected = path.with_name(RECEIPT_SIGNATURE)
    remedy = f"expected {expected}; ask the coordinator for it (opt-out --sign-key)"
    # The bytes of what was read: the file may be another one by now.
    signer = check_signature(sealed_json(receipt).encode(), signed, trust, path, remedy=remedy)
    if signer is None:
        note(
            f"warning: nobody signed {path}: anybody may have written it; ask the coordinator for a"
            " signed one (opt-out --sign-key)"
        )
    return signer


def _check_leavers(path: Path, receipt: Mapping[str, Any]) -> None:
    """Checks that a receipt names the leavers as they were handed over.

    Otherwise it could name one expert and have us look for another.
    """
    for gone in receipt["removed"]:
        where = f"{path}: the leaver {gone['name']!r}"
        if gone["manifest"] is None:  # of an imported model
            continue
        claimed = recorded(path, gone["manifest"], gone["signature"])
        claimed.check_origin()
        if claimed.name != gone["name"] or claimed.fingerprint != receipt["anchor"]:
            raise UserError(
                f"{where} has the manifest of {claimed.name!r}, or of another anchor; do not"
                " believe the receipt"
            )
        if digests_of(gone) != set(gone["digests"]):
            raise UserError(
                f"{where} has other digests than its manifest; do not believe the receipt"
            )


def _check_members(model: Artifact, receipt: Mapping[str, Any]) -> None:
    """Checks the members that the model's description names."""
    for member in model.members:
        for gone in receipt["removed"]:
            if digests_of(member) == set(gone["digests"]):
                raise UserError(
                    f"{model.path} still holds {gone['name']!r}, which the receipt says is removed,"
                    f" as {member['name']!r}"
                )
    members = [{"name": m["name"], "manifest": manifest_digest(m)} for m in model.members]
    if members != list(receipt["remaining"]):
        got = ", ".join(member["name"] for member in members) or "none"
        expected = ", ".join(member["name"] for member in receipt["remaining"]) or "none"
        raise UserError(
            f"{model.path} is made of other contributions ({got}) than the receipt says remain"
            f" ({expected})"
        )


def _check_weights(model: Artifact, receipt: Mapping[str, Any]) -> None:
    """Checks the weights themselves, whatever the description says of them."""
    weights = model.path / "weights"
    anchor = sketches_of(weights, model.config)
    for index, name in enumerate(model.experts):
        here = sketches_of(weights, model.config, index) - anchor
        for gone in receipt["removed"]:
            try:
                removed = decoded(gone["sketch"], model.config)
            except ValueError as error:
                raise UserError(
                    f"the receipt's sketch of {gone['name']!r} is damaged: {error}"
                ) from None
            if is_copy(here, removed):
                raise UserError(
                    f"{model.path} still holds {gone['name']!r}, or nearly, which the receipt says"
                    f" is removed: as {name!r}"
                )
