"""`flexolmo verify`: every digest of a contribution, an anchor, a model, a store or prepared data, recomputed, one shard at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.artifact import DESCRIPTION, Artifact, open_artifact, read_sealed
from flexolmo_jax.data.records import open_records, sha256_of
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.admission import admission, admit
from flexolmo_jax.exchange.anchor import layouts, open_anchor, verify_anchor
from flexolmo_jax.exchange.contribution import MANIFEST, name_of_tensor, open_contribution
from flexolmo_jax.exchange.signature import ANY, Trust
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.paths import listing
from flexolmo_jax.storage.weights import Reader, shard_name

from .store import Store

RECEIPT = "receipt.json"


def verify(
    path: Path, anchor_path: Path | None = None, trust: Trust = ANY, public: Path | None = None, *, refuse: bool = False
) -> dict[str, Any]:
    """What was checked. Raises UserError naming the first thing that is wrong.

    With an anchor, a contribution or a model must also have been made from that very one. `trust` is of contributions; so is
    `public`, held-out text for the admission report, whose findings are warnings, or with `refuse` errors.
    """
    if refuse and not public:
        raise UserError("there is nothing to refuse by: the admission report needs public text; give --public")
    if public and not (anchor_path and (path / MANIFEST).exists()):
        raise UserError("the admission report is of a contribution tried with its anchor; give --anchor too")
    anchor = open_anchor(anchor_path) if anchor_path else None
    if (path / "index.json").exists():
        open_records(path, "train").check_digests()
        return {"path": str(path), "kind": "prepared data", "verified": True}
    if (path / "objects").is_dir():
        return {"path": str(path), "kind": "store", "verified": True, "objects": Store.existing(path).verify()}
    if not (path / DESCRIPTION).exists():
        contribution = open_contribution(path)
        signer = contribution.check(anchor, trust)
        report = {}
        if public and anchor:
            report = {"admission": admission(contribution, anchor, public)}
            _judge(path, report["admission"]["findings"], refuse)
        elif anchor:
            admit(contribution, anchor)  # as a merge does; it reads every tensor, as the report does
        tensors = len(contribution.manifest["tensors"]) if anchor else sum(1 for _ in contribution.tensors())
        return {
            "path": str(path),
            "kind": "contribution",
            "verified": True,
            "tensors": tensors,
            "anchor": contribution.fingerprint,
            "signed_by": signer,
            **report,
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
        verify_model(artifact)
    tensors = len(artifact.description["tensors"])
    return {"path": str(path), "kind": artifact.kind, "verified": True, "tensors": tensors, "anchor": artifact.fingerprint}


def _judge(path: Path, findings: list[str], refuse: bool) -> None:
    if refuse and findings:
        raise UserError(f"{path} is not admitted: {'; '.join(findings)}")
    for finding in findings:
        note(f"warning: {path}: {finding}")


def verify_model(model: Artifact) -> None:
    """Raises UserError naming the first file or tensor of a merged model that is not what was merged, is missing or does not belong."""
    declared = model.description["files"]
    target = layouts(model.config, model.description["tensors"])
    shards = {f"weights/{shard_name(path, index)}" for path, layout in target.items() for index in layout.indices()}
    expected = shards | declared.keys() | {DESCRIPTION}
    found = listing(model.path).keys() - {RECEIPT}
    for kind, names in (("misses", expected - found), ("holds unknown files:", found - expected)):
        if names:
            raise UserError(f"{model.path} {kind} {', '.join(sorted(names)[:3])}; merge it again")
    for name, digest in declared.items():
        if sha256_of(model.path / name) != digest:
            raise UserError(f"{model.path / name} is not the file that was written (its SHA-256 differs); merge it again")
    if (model.path / RECEIPT).exists():
        try:
            read_sealed(model.path / RECEIPT)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{model.path / RECEIPT} is damaged: {error!s:.80}") from None
    for what, digest, expected_digest in tensor_digests(model):
        if digest != expected_digest:
            raise UserError(f"{model.path}: the bytes of {what} are not those that were merged; merge it again")


def tensor_digests(model: Artifact) -> Iterator[tuple[str, str, str]]:
    """(what, SHA-256 of its bytes on the disk, SHA-256 that it should have) of all that a merged model holds."""
    reader, anchor = Reader(model.path / "weights"), model.description["anchor"]
    tuned = model.description.get("router", {}).get("tensors", {})
    for path, layout in layouts(model.config, model.description["tensors"]).items():
        if not path.startswith("experts/"):
            yield path, reader.digest(path, layout.boxes()), anchor[path]["sha256"]
            continue
        L = model.config.n_layers
        if path in tuned:
            yield path, reader.digest(path, layout.whole()), tuned[path]
            continue
        for index, name in enumerate(model.experts):
            members = model.description["members"]
            tensors = members[index - 1]["tensors"] if index else anchor
            if index and name_of_tensor(path, 0) in tensors:
                for layer in range(L):
                    tensor = name_of_tensor(path, layer)
                    got = reader.digest(path, layout.boxes(layer=layer, expert=index))
                    yield f"{tensor} of {name}", got, tensors[tensor]["sha256"]
            elif not index and path in tensors:
                yield f"{path} of {name}", reader.digest(path, layout.boxes(expert=0)), tensors[path]["sha256"]
            else:  # a bias that it does not have
                zeros = sum(np.count_nonzero(reader.read(path, box).view(np.uint8)) for box in layout.boxes(expert=index))
                yield f"{path} of {name}", "zeros" if not zeros else "not zeros", "zeros"
