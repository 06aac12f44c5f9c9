"""`flexolmo info`: what a run, anchor, contribution, model, store or prepared directory is.

Of a contribution it also says what leaves the owner.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax.artifact import DESCRIPTION, open_artifact
from flexolmo_jax.data.records import Index
from flexolmo_jax.exchange.contribution import MANIFEST, SIGNATURE, TENSORS, open_contribution
from flexolmo_jax.exchange.manifest import told
from flexolmo_jax.integrity import manifest_of
from flexolmo_jax.storage.outputs import STORE_FILE
from flexolmo_jax.train.metrics import last_entry

from .store import Store


def info(path: Path) -> dict[str, Any]:
    """What a directory is, from its descriptions; no weights are read.

    Raises UserError for a directory that none of our commands made.
    """
    if (path / MANIFEST).exists():
        return _contribution(path)
    if (path / "index.json").exists() and not (path / DESCRIPTION).exists():
        return _prepared(path)
    if (path / STORE_FILE).exists():
        return Store.existing(path).info()
    artifact = open_artifact(path)
    description = artifact.description
    keep = ("run", "base", "fingerprint", "embedder", "public", "members")
    described = {key: description[key] for key in keep if key in description}
    if "members" in described:
        described["members"] = [_member(member) for member in described["members"]]
    entry = last_entry(path) if artifact.kind == "run" else None
    return {
        "kind": artifact.kind,
        "experts": list(artifact.experts),
        **described,
        "stored_parameters": _parameters(description["tensors"]),
        "model": description["model"],
        **({"last_metrics": entry} if entry else {}),
    }


def _parameters(tensors: Mapping[str, Any]) -> int:
    return sum(math.prod(entry["shape"]) for entry in tensors.values())


def _prepared(path: Path) -> dict[str, Any]:
    index = Index.read(path)
    splits = {
        name: {"records": s.records, "documents": s.documents, "tokens": s.tokens}
        for name, s in index.splits.items()
    }
    known = {"seq_len": index.seq_len, "tokenizer": index.tokenizer_digest}
    return {"kind": "prepared data", **known, **splits}


def _member(member: dict[str, Any]) -> dict[str, Any]:
    name = member["name"]
    if (manifest := manifest_of(member)) is None:
        return {"name": name, **told(member), "manifest": member["manifest"]}
    is_signed = member["signature"] is not None
    return {"name": name, **told(manifest), "manifest": manifest["sha256"], "signed": is_signed}


def _contribution(path: Path) -> dict[str, Any]:
    contribution = open_contribution(path)
    manifest = contribution.manifest
    parameters = _parameters(manifest["tensors"])
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
