"""Merging: anchor + contributions -> one mixture-of-experts model, without data and without training; and taking experts out.

Expert FFNs, router rows and biases are concatenated behind the anchor's along the expert axis; the trunk is the anchor's, byte for
byte. The order of contributions decides expert indices and nothing else. Dropping an expert removes its slice: the files are
those of the model that never had it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexolmo_jax import checkpoint
from flexolmo_jax.artifact import Artifact, open_artifact, write_description
from flexolmo_jax.errors import UserError
from flexolmo_jax.files import check_new, new_directory
from flexolmo_jax.model import Params

from .anchor import check_tensors, digests, open_anchor
from .contribution import Contribution, open_contribution

DEFAULT_ACTIVE = 4


def merge(anchor_path: Path, contribution_paths: Sequence[Path], out: Path, *, active: int | None = None) -> Artifact:
    """Writes the merged model. `active` is the stored number of experts a token uses (default: 4, or all if there are fewer).

    Raises UserError, before any tensor is read, for a contribution to another anchor, a name given twice, and `active` above E;
    and for tensors, the anchor's or a contribution's, that are not what their digests say.
    """
    check_new(out)
    anchor = open_anchor(anchor_path)
    contributions = [open_contribution(path, anchor) for path in contribution_paths]
    description = _description(anchor.description, [_member(c) for c in contributions], active)
    params = anchor.params()
    check_tensors(anchor, params)  # digests of the result must not be taken of bytes that nobody published
    if contributions:
        params["experts"] = _concatenate(params["experts"], contributions, description["model"]["router_bias"])
    return _save(out, description, anchor, params)


def opt_out(model_path: Path, names: Sequence[str], out: Path) -> Artifact:
    """Writes the model without these experts: exactly the merge that never had them.

    Raises UserError for a name the model does not have and for the anchor's, and for tensors that are not what was merged.
    """
    check_new(out)
    model = open_model(model_path)
    model.check_experts(names)
    members = [m for m in model.description["members"] if m["name"] not in names]
    description = _description(model.description, members, min(model.config.n_active, 1 + len(members)))
    params = model.params()
    check_tensors(model, params)
    kept = np.array([i for i, name in enumerate(model.experts) if name not in names])
    if not description["model"]["router_bias"]:
        params["experts"].pop("bias", None)
    params["experts"] = {key: a[:, kept] for key, a in params["experts"].items()}
    return _save(out, description, model, params)


def open_model(path: Path) -> Artifact:
    """Opens a merged model. Raises UserError for anything else."""
    artifact = open_artifact(path)
    if artifact.kind != "model":
        raise UserError(f"{path} is a {artifact.kind}; expected a merged model (`flexolmo merge` makes one)")
    return artifact


def _member(contribution: Contribution) -> dict[str, Any]:
    """What a model keeps of a manifest, for licences and receipts."""
    keys = ("name", "domain", "licence", "router_bias", "tensors", "training", "privacy")
    return {key: contribution.manifest[key] for key in keys}


def _description(base: dict[str, Any], members: list[dict[str, Any]], active: int | None) -> dict[str, Any]:
    names = ["anchor", *(m["name"] for m in members)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two experts are called {name!r}; give each contribution a name of its own")
    if active is not None and not 1 <= active <= len(names):
        raise UserError(f"--active is {active}; expected 1 to {len(names)}, the number of experts ({', '.join(names)})")
    model = base["model"] | {
        "n_experts": len(names),
        "n_active": active or min(len(names), DEFAULT_ACTIVE),
        "router_bias": any(m["router_bias"] for m in members),
    }
    return {
        "kind": "model",
        "model": model,
        "experts": names,
        "members": members,
        "fingerprint": base["fingerprint"],
        "tokenizer": base["tokenizer"],
    }


def _concatenate(anchor: Params, contributions: Sequence[Contribution], has_bias: bool) -> Params:
    experts = [c.expert() for c in contributions]
    dtype = anchor["row"].dtype
    anchor = anchor | {"bias": jnp.zeros(anchor["row"].shape[:2], dtype)}  # the anchor's is not used: 0 says so
    keys = anchor.keys() if has_bias else anchor.keys() - {"bias"}
    return {key: jnp.concatenate([anchor[key], *(jnp.asarray(e[key], dtype) for e in experts)], axis=1) for key in sorted(keys)}


def _save(out: Path, description: dict[str, Any], source: Artifact, params: Params) -> Artifact:
    with new_directory(out) as directory:
        source.tokenizer.save(directory / "tokenizer.json")
        checkpoint.save_weights(directory / "weights", params)
        write_description(directory, description | {"tensors": digests(params)})
    return open_artifact(out)
