"""`flexolmo info`: what a run, anchor, contribution, model, store or prepared directory is; of a
contribution, what leaves its owner."""

import math
from pathlib import Path
from typing import Any

from flexolmo_jax.artifact import DESCRIPTION, open_artifact
from flexolmo_jax.data.records import Index
from flexolmo_jax.exchange.contribution import MANIFEST, SIGNATURE, TENSORS, open_contribution
from flexolmo_jax.exchange.manifest import told
from flexolmo_jax.integrity import manifest_of
from flexolmo_jax.storage.outputs import STORE_FILE
from flexolmo_jax.train.metrics import last_row

from .store import Store


def info(path: Path) -> dict[str, Any]:
    """Reads descriptions only, no weights. Raises UserError where there is nothing of ours."""
    if (path / MANIFEST).exists():
        return _contribution(path)
    if (path / "index.json").exists() and not (path / DESCRIPTION).exists():
        index = Index.read(path)
        splits = {
            name: {"records": s.records, "documents": s.documents, "tokens": s.tokens}
            for name, s in index.splits.items()
        }
        return {
            "kind": "prepared data",
            "seq_len": index.seq_len,
            "tokenizer": index.tokenizer_digest,
            **splits,
        }
    if (path / STORE_FILE).exists():
        return Store.existing(path).info()
    artifact = open_artifact(path)
    keep = ("run", "base", "fingerprint", "embedder", "public", "members")
    described = {key: artifact.description[key] for key in keep if key in artifact.description}
    if "members" in described:
        described["members"] = [_member(member) for member in described["members"]]
    sizes = {
        "stored_parameters": sum(
            math.prod(t["shape"]) for t in artifact.description["tensors"].values()
        )
    }
    row = last_row(path) if artifact.kind == "run" else None
    last = {"last_metrics": row} if row else {}
    return {
        "kind": artifact.kind,
        "experts": list(artifact.experts),
        **described,
        **sizes,
        "model": artifact.description["model"],
        **last,
    }


def _member(member: dict[str, Any]) -> dict[str, Any]:
    if (manifest := manifest_of(member)) is None:
        return {"name": member["name"], **told(member), "manifest": member["manifest"]}
    return {
        "name": member["name"],
        **told(manifest),
        "manifest": manifest["sha256"],
        "signed": member["signature"] is not None,
    }


def _contribution(path: Path) -> dict[str, Any]:
    contribution = open_contribution(path)
    manifest = contribution.manifest
    parameters = sum(math.prod(t["shape"]) for t in manifest["tensors"].values())
    return {
        "kind": "contribution",
        **{key: manifest[key] for key in ("format", "name", "anchor", "dtype")},
        **told(manifest),
        "leaves_the_owner": {
            TENSORS: (
                f"{len(manifest['tensors'])} tensors, {parameters:,} {manifest['dtype']} numbers:"
                " expert weights, router rows" + (" and biases" if contribution.has_bias else "")
            ),
            MANIFEST: "names, digests, the model config and the training summary shown here",
            **({SIGNATURE: "a public key and a signature"} if contribution.signature else {}),
            "documents": "none",
        },
    }
