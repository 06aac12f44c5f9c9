"""`flexolmo info`: what a run, anchor, contribution, model, store or prepared directory is.

Of a contribution it also says what leaves the owner.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.artifact import DESCRIPTION, open_artifact
from flexolmo_jax.data.records import Index
from flexolmo_jax.exchange.contribution import MANIFEST, SIGNATURE, TENSORS, open_contribution
from flexolmo_jax.exchange.manifest import told
from flexolmo_jax.exchange.signature import named_key
from flexolmo_jax.integrity import manifest_of
from flexolmo_jax.storage.outputs import STORE_FILE
from flexolmo_jax.storage.paths import takes_paths
from flexolmo_jax.train.metrics import last_entry

from .store import Store

PARTS, PROOF = ("stated", "measured"), ("manifest", "signed_by")
SHOWN = 16  # characters of a digest or a key
CUT = f"the first {SHOWN} characters; `flexolmo verify` checks and shows them"


@takes_paths
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
    keep = (
        "run",
        "average",
        "base",
        "fingerprint",
        "embedder",
        "chat",
        "conventions",
        "public",
        "members",
    )
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
    signature = member["signature"]
    signer = None if signature is None else named_key(signature.encode())
    proof = {"manifest": manifest["sha256"], "signed": signer is not None, "signed_by": signer}
    return {"name": name, **told(manifest), **proof}


def in_brief(found: dict[str, Any]) -> dict[str, Any]:
    """What `info` found, for people: what all members say once, and at most two lines of each."""
    if not (members := found.get("members")):
        return found
    said: dict[str, Any] = {part: _shared([m[part] for m in members]) for part in PARTS}
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    for member in members:
        name = {"name": member["name"]}
        proof = {key: (member.get(key) or "none")[:SHOWN] for key in PROOF}
        own = {p: {k: v for k, v in member[p].items() if k not in said[p]} for p in PARTS}
        rows["stated"].append(name | proof | {"stated": own["stated"]})
        rows["measured"] += [name | {"measured": own["measured"]}] if own["measured"] else []
    brief = {key: value for key, value in found.items() if key != "members"}
    brief["all_members"] = {" and ".join(PROOF): CUT, **said}
    return brief | {"members": rows["stated"], "members_measured": rows["measured"]}


def _shared(sayings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The keys and values that all of these have."""
    first, *others = sayings
    return {
        key: value
        for key, value in first.items()
        if all(key in other and other[key] == value for other in others)
    }


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
