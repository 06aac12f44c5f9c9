"""Packaging: an owner's pair run becomes a contribution, evaluated as it is handed over."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml
from safetensors.numpy import save_file

from flexolmo_jax.artifact import Artifact, open_artifact
from flexolmo_jax.config import RunConfig, resolve, to_dict
from flexolmo_jax.data.documents import has_documents
from flexolmo_jax.data.prepare import prepare_cached
from flexolmo_jax.data.records import Index, open_records
from flexolmo_jax.errors import UserError
from flexolmo_jax.files import check_new, new_directory
from flexolmo_jax.model import Params
from flexolmo_jax.progress import note
from flexolmo_jax.tensorfile import TensorFile
from flexolmo_jax.train.evaluate import make_scorer, score_records

from .anchor import open_anchor, tensor_digest
from .contribution import FORMAT, MANIFEST, SIGNATURE, TENSORS, Contribution, name_of_tensor, open_contribution, sealed
from .signature import load_key, sign


def package(source: Path, out: Path, which: str = "last", sign_key: Path | None = None) -> Contribution:
    """Makes a contribution of a pair's run: cast to the anchor's dtype first, then evaluated: what is merged is what was measured.

    `sign_key` is an owner's private key. Raises UserError for a source that is no pair's run, a key that is none, and values that
    are not finite.
    """
    check_new(out)
    key = load_key(sign_key) if sign_key else None
    run = open_artifact(source)
    if not run.is_pair:
        raise UserError(f"{source} is not a pair's run; a contribution is made of one")
    config = resolve(yaml.safe_load((source / "config.yaml").read_text()))
    assert config.pair is not None
    anchor = open_anchor(run.base().path)
    dtype = anchor.dtype
    step = run.step(which)
    params = run.params(str(step))
    released = {name: np.asarray(a.astype(dtype)) for name, a in params["expert"].items()}
    scores = _evaluate(run, anchor, params, released, config)
    tensors = _by_layer(released)
    with new_directory(out) as directory:
        save_file(tensors, directory / TENSORS)
        with TensorFile(directory / TENSORS) as file:
            header = file.header_sha256
        manifest = {
            "format": FORMAT,
            "name": config.pair.name,
            "owner": config.pair.owner,
            "domain": config.pair.domain or config.pair.name,
            "licence": config.pair.licence,
            "expires": config.pair.expires or None,
            "anchor": anchor.fingerprint,
            "model": to_dict(anchor.config),
            "router_bias": "bias" in released,
            "dtype": dtype,
            "tensors": {name: _entry(tensor) for name, tensor in sorted(tensors.items())},
            "header": header,
            "training": {
                "steps": step,
                "tokens": step * config.data.batch_size * config.data.seq_len,
                "public_share": config.pair.public_share,
                "bits_per_byte": scores,
            },
            "privacy": to_dict(config.pair.privacy) if config.pair.privacy else "none",
            "tool": f"flexolmo-jax {_version()}",
        }
        text = sealed(manifest)
        (directory / MANIFEST).write_bytes(text)
        if key:
            (directory / SIGNATURE).write_bytes(sign(text, key))
    note(f"packaged {out}: {sum(t.nbytes for t in tensors.values()):,} bytes of weights, no data")
    return open_contribution(out)


def _evaluate(run: Artifact, anchor: Artifact, params: Params, released: dict[str, np.ndarray], config: RunConfig) -> dict[str, Any]:
    """Held-out bits per byte of the anchor and of the pair as it is handed over, on the owner's text and on public text."""
    assert config.pair is not None
    heldout = {d.title: d.path for d in (config.data.eval or config.data.train)}
    heldout |= {"public": config.pair.public or str(anchor.path / "public")}
    pair = params | {"expert": {name: jnp.asarray(a) for name, a in released.items()}}
    dense = {name: branch for name, branch in params.items() if name != "expert"}
    scorers = {"anchor": (make_scorer(anchor.config), dense), "pair": (make_scorer(run.config), pair)}
    scores: dict[str, Any] = {who: {} for who in scorers}
    for name, path in heldout.items():
        # Records are scored whatever their length: an owner's need not be as long as the anchor's public ones.
        seq_len = config.data.seq_len if has_documents(Path(path)) else Index.read(Path(path)).seq_len
        records = open_records(prepare_cached(Path(path), run.tokenizer, seq_len), "heldout")
        if len(records):
            for who, (scorer, weights) in scorers.items():
                score = score_records(scorer, weights, records, run.tokenizer, limit=config.train.eval_records)
                scores[who][name] = round(score.bits_per_byte, 6)
    return scores


def _by_layer(expert: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    layers = range(expert["row"].shape[0])
    return {name_of_tensor(leaf, layer): np.array(array[layer, 0], order="C") for leaf, array in expert.items() for layer in layers}


def _entry(tensor: np.ndarray) -> dict[str, Any]:
    """What a manifest says of one tensor."""
    return {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "sha256": tensor_digest(tensor)}


def _version() -> str:
    try:
        return version("flexolmo-jax")
    except PackageNotFoundError:  # a checkout that is not installed
        return "checkout"
