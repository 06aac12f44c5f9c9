"""`flexolmo verify`: every digest of a contribution, an anchor, a model or prepared data, recomputed."""

from pathlib import Path
from typing import Any

from flexolmo_jax.artifact import DESCRIPTION, open_artifact
from flexolmo_jax.data.records import open_records
from flexolmo_jax.errors import UserError

from .anchor import check_tensors, open_anchor, verify_anchor
from .contribution import open_contribution


def verify(path: Path, anchor_path: Path | None = None) -> dict[str, Any]:
    """What was checked. Raises UserError naming the first thing that is wrong.

    With an anchor, a contribution or a model must also have been made from that very one.
    """
    anchor = open_anchor(anchor_path) if anchor_path else None
    if (path / "index.json").exists():
        open_records(path, "train").check_digests()
        return {"path": str(path), "kind": "prepared data", "verified": True}
    if not (path / DESCRIPTION).exists():
        contribution = open_contribution(path, anchor)
        contribution.expert()
        tensors = len(contribution.manifest["tensors"])
        return {
            "path": str(path),
            "kind": "contribution",
            "verified": True,
            "tensors": tensors,
            "anchor": contribution.fingerprint,
        }
    artifact = open_artifact(path)
    if artifact.kind == "run":
        raise UserError(f"{path} is a run; expected a contribution, an anchor or a model (`flexolmo package` or `publish` makes one)")
    if anchor is not None and artifact.fingerprint != anchor.fingerprint:
        raise UserError(f"{path} was made from the anchor {artifact.fingerprint}; {anchor.path} is {anchor.fingerprint}")
    if artifact.kind == "anchor":
        verify_anchor(artifact)
        open_records(path / "public", "train").check_digests()
    else:
        check_tensors(artifact, artifact.params())
    tensors = len(artifact.description["tensors"])
    return {"path": str(path), "kind": artifact.kind, "verified": True, "tensors": tensors, "anchor": artifact.fingerprint}
