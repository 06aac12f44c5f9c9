"""`flexolmo screen`: what another owner's contribution would do to one's own text, as one number.

Two models are scored on the held-out records of the owner's documents: the model as it is, and the
model with the candidate appended in memory. Nothing else of the text leaves the owner.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flexolmo_jax.artifact import Artifact, active_among, placement_on
from flexolmo_jax.config import MeshConfig, Reading
from flexolmo_jax.data.documents import AS_TEXT
from flexolmo_jax.data.prepare import open_heldout
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.bits_per_byte import evaluate, raw_seq_len
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.contribution import Contribution, open_contribution
from flexolmo_jax.exchange.placing import place_expert
from flexolmo_jax.exchange.screening import make_verdict, write_verdict
from flexolmo_jax.exchange.signature import load_key
from flexolmo_jax.loaded import LoadedModel, load
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.runtime.sharding import batch_over
from flexolmo_jax.storage.outputs import check_new_file
from flexolmo_jax.storage.paths import takes_paths
from flexolmo_jax.train.evaluate import BATCH_SIZE

MAX_WORSE = 0.02


@takes_paths
def screen(  # noqa: PLR0913 - the verb's options
    candidate_path: Path,
    anchor_path: Path,
    model_path: Path,
    documents: Sequence[Path],
    out: Path,
    *,
    max_worse: float = MAX_WORSE,
    sign_key: Path | None = None,
    limit: int | None = None,
    mesh: MeshConfig | None = None,
    reading: Reading = AS_TEXT,
) -> dict[str, Any]:
    """Writes the verdict. Returns it with the bits per byte behind it, which the verdict omits.

    Args:
        model_path: a merged model made from this anchor, or the anchor.
        documents: the owner's, which are read as `reading` says, or prepared directories of them.
        max_worse: the relative rise of bits per byte that still passes.
        limit: how many records of each to read, a sample of them.
        mesh: the devices that the models are spread over (default: one device).

    Raises:
        UserError: for a candidate that does not fit, text with nothing held out, numbers that are
            not finite, and a mesh that does not fit the devices.
    """
    _check_options(out, max_worse)
    key = load_key(sign_key) if sign_key else None
    anchor, candidate = open_anchor(anchor_path), open_contribution(candidate_path)
    candidate.check(anchor)
    model = load(model_path, mesh=mesh)
    _check_model(model.artifact, anchor, candidate)
    scored: Any = (_scored(model, documents, reading), limit, reading)
    without, with_it = _bits(model, *scored), _bits(appended(model, candidate), *scored)
    verdict = make_verdict(
        anchor=str(anchor.fingerprint),
        candidate=candidate.manifest["sha256"],
        model=model.artifact.description["sha256"],
        tokens=without["tokens"],
        bytes=without["bytes"],
        change=_change(candidate, without["bits"], with_it["bits"]),
        max_worse=max_worse,
    )
    write_verdict(verdict, key, out)
    if key is None:
        note(f"warning: {out} is not signed, so --require-screening refuses it; give --sign-key")
    both = {"without": without, "with_the_candidate": with_it}
    private = {name: found["bits"] / found["bytes"] for name, found in both.items()}
    told = {"out": str(out), "signed": key is not None, **dataclasses.asdict(verdict)}
    return told | {"not_in_the_verdict": {"bits_per_byte": private}}


def _change(candidate: Contribution, without: float, with_it: float) -> float:
    """The relative rise of bits with the candidate. Raises UserError where it is not finite."""
    if not math.isfinite(with_it):
        raise UserError(
            f"{candidate.path} gives numbers that are not finite for your text; it is broken:"
            " refuse it"
        )
    return with_it / without - 1


def appended(model: LoadedModel, candidate: Contribution) -> LoadedModel:
    """The model that `flexolmo append` would write, in memory.

    `model` is used up: each array of its experts goes when the new one is made, so that two whole
    models are never in memory. Raises UserError as `Contribution.tensors` does.
    """
    experts = model.params["experts"]
    has_bias = model.config.router_bias or candidate.has_bias
    L, E, dtype = model.config.n_layers, len(model.experts), experts["row"].dtype
    active = active_among(model.config, E + 1)
    sizes = {"n_experts": E + 1, "n_active": active, "router_bias": has_bias}
    config = dataclasses.replace(model.config, **sizes)
    alone, joined = (placement_on(model.mesh, config, pair=pair) for pair in (True, False))
    new = place_expert(candidate.tensors(), config, alone)
    if has_bias:
        experts.setdefault("bias", jnp.zeros((L, E), dtype))
        new.setdefault("bias", jnp.zeros((L, 1), dtype))
    for name in list(experts):
        shape = (L, E + 1, *experts[name].shape[2:])
        append = jax.jit(jnp.hstack, out_shardings=joined(f"experts/{name}", shape))
        experts[name] = append([experts[name], new.pop(name)])
    names = (*model.experts, candidate.name)
    artifact = dataclasses.replace(model.artifact, config=config, experts=names)
    return dataclasses.replace(model, artifact=artifact)


def _check_options(out: Path, max_worse: float) -> None:
    if not 0 <= max_worse < math.inf:
        raise UserError(
            f"--max-worse is {max_worse}; expected a fraction of bits per byte, such as 0.02, and"
            " not below 0"
        )
    check_new_file(out)
    if out.suffix != ".json":
        raise UserError(f"{out} has to end in .json, for --require-screening to find it")


def _check_model(model: Artifact, anchor: Artifact, candidate: Contribution) -> None:
    if model.kind == "run":
        raise UserError(
            f"{model.path} is a run; expected a merged model, or the anchor (`flexolmo merge"
            " --anchor ANCHOR MINE` makes one)"
        )
    if model.fingerprint != anchor.fingerprint:
        raise UserError(
            f"{model.path} was made from the anchor {str(model.fingerprint)[:16]}; {anchor.path} is"
            f" {str(anchor.fingerprint)[:16]}"
        )
    if candidate.name in model.experts:
        raise UserError(
            f"{model.path} already has an expert {candidate.name!r}; give the model without it"
            " (`flexolmo opt-out`)"
        )


def _scored(model: LoadedModel, documents: Sequence[Path], reading: Reading) -> list[Path]:
    """The documents with held-out text: a file of few documents often has none, which a line
    tells."""
    length = raw_seq_len(model)
    opened = {
        path: open_heldout(path, model.tokenizer, length, reading=reading) for path in documents
    }
    scored = [path for path in documents if len(opened[path])]
    if not scored:
        names = ", ".join(map(str, documents))
        raise UserError(f"{names}: none of the documents is held out (1 in 20 is); give more")
    for path in documents:
        if path not in scored:
            note(f"warning: {path}: none of its documents is held out, so nothing of it is scored")
    return scored


def _bits(
    model: LoadedModel, documents: Sequence[Path], limit: int | None, reading: Reading
) -> dict[str, Any]:
    """Bits, tokens and bytes of all documents together."""
    names = [str(number) for number in range(len(documents))]  # files may have one name
    size = batch_over(model.mesh, BATCH_SIZE)
    how: dict[str, Any] = {"limit": limit, "batch_size": size, "reading": reading}
    scores = evaluate(model, documents, names=names, **how)
    bits = sum(scores["bits_per_byte"][name] * count for name, count in scores["bytes"].items())
    return {
        "bits": bits,
        "tokens": sum(scores["tokens"].values()),
        "bytes": sum(scores["bytes"].values()),
    }
