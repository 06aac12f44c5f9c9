"""What a coordinator should know of an expert before merging it: does it look like one, and what would it do to public text?

Digests and signatures say who made an expert, not that it is good. This compares its weights with the anchor's, from which every expert
starts, and tries it: anchor and expert merged, on held-out public text. Whatever is out of the policy's bounds is a finding.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexolmo_jax.artifact import Artifact
from flexolmo_jax.data.prepare import open_heldout
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.bits_per_byte import RAW_SEQ_LEN
from flexolmo_jax.integrity import MATRICES, leaf_of
from flexolmo_jax.loaded import load
from flexolmo_jax.train.evaluate import make_scorer, score_records

from .contribution import Contribution

RECORDS = 64  # of public text, at most
ITERATIONS = 16  # of the power method: the largest singular value to a few percent


@dataclass(frozen=True)
class Policy:
    """Bounds for what is merged without a second look. The four experts of `make demo` are in brackets."""

    norm: float = 3.0  # an expert's Frobenius norm is at most so many times the anchor's, and at least that part of it (1.4 to 1.6)
    spectral: float = 4.0  # the same of the largest singular value (1.0 to 1.7)
    cosine: float = 0.2  # of the angle between an expert's matrix and the anchor's, at least (0.63 to 0.79)
    row_norm: float = 25.0  # a router row is at most so many times as long as the anchor's (4.1 to 7.4)
    public_share: float = 0.75  # of the routing weight on public text that the expert may take beside the anchor, on average (0.11 to 0.29)
    public_loss: float = 0.05  # by this part may bits per byte of public text get worse (0.007 to 0.012)


DEFAULT = Policy()


def admission(contribution: Contribution, anchor: Artifact, public: Path, policy: Policy = DEFAULT) -> dict[str, Any]:
    """Measures and findings. Reads and checks every tensor; needs the memory of the anchor and one expert.

    Raises UserError as `Contribution.tensors` does, and for public data without held-out records.
    """
    model = load(anchor.path)
    ours = {name: np.asarray(model.params["experts"][name]) for name in (*MATRICES, "row")}
    L, dtype = anchor.config.n_layers, ours["row"].dtype
    expert = {name: np.zeros_like(array) for name, array in ours.items()} | (
        {"bias": np.zeros((L, 1), dtype)} if contribution.has_bias else {}
    )
    for name, tensor in contribution.tensors():
        leaf, layer = leaf_of(name)
        expert[leaf.removeprefix("experts/")][layer, 0] = tensor
    weights = {name: _compare(expert[name][:, 0], ours[name][:, 0]) for name in MATRICES}
    norms = [np.linalg.norm(a[:, 0].astype(np.float32), axis=1) for a in (expert["row"], ours["row"])]
    trial = _trial(contribution, model, expert, public)
    report = {"weights": weights, "row_norm_of_the_anchors": _range(norms[0] / np.maximum(norms[1], 1e-12)), **trial}
    return report | {"findings": _findings(report, policy), "policy": dataclasses.asdict(policy)}


def _trial(contribution: Contribution, model: Any, expert: Mapping[str, np.ndarray], public: Path) -> dict[str, Any]:
    records = open_heldout(public, model.tokenizer, min(RAW_SEQ_LEN, model.config.max_seq_len))
    if not len(records):
        raise UserError(f"{public} has no held-out records; give more public text")
    pair = model.params | {"expert": {name: jnp.asarray(a) for name, a in expert.items()}}
    config = dataclasses.replace(model.config, router_bias=contribution.has_bias)
    before = score_records(make_scorer(model.config), model.params, records, model.tokenizer, limit=RECORDS)
    after = score_records(make_scorer(config), pair, records, model.tokenizer, limit=RECORDS)
    by_layer = after.routing[:, 1]
    return {
        "public_tokens": after.tokens,
        "public_share": float(by_layer.mean()),
        "public_share_by_layer": by_layer.tolist(),
        "public_bits_per_byte": {"anchor": before.bits_per_byte, "with_the_expert": after.bits_per_byte},
    }


def _compare(expert: np.ndarray, anchor: np.ndarray) -> dict[str, dict[str, float]]:
    """[L, ., .] each: the smallest and the largest of each measure over the layers."""
    norm, spectral, cosine = [], [], []
    for theirs, ours in zip(expert, anchor, strict=True):
        theirs, ours = theirs.astype(np.float32), ours.astype(np.float32)
        sizes = np.linalg.norm(theirs), np.linalg.norm(ours)
        norm.append(sizes[0] / max(sizes[1], 1e-12))
        spectral.append(_largest_singular_value(theirs) / max(_largest_singular_value(ours), 1e-12))
        cosine.append(np.vdot(theirs, ours) / max(sizes[0] * sizes[1], 1e-12))
    return {"Frobenius": _range(norm), "spectral": _range(spectral), "cosine": _range(cosine)}


def _largest_singular_value(matrix: np.ndarray) -> float:
    vector = np.random.default_rng(0).standard_normal(matrix.shape[1]).astype(np.float32)
    for _ in range(ITERATIONS):
        vector = matrix.T @ (matrix @ (vector / max(np.linalg.norm(vector), 1e-30)))
    return float(np.linalg.norm(vector) ** 0.5)


def _range(values: Any) -> dict[str, float]:
    return {"least": float(np.min(values)), "most": float(np.max(values))}


def _findings(report: Mapping[str, Any], policy: Policy) -> list[str]:
    found = []
    for name, measures in report["weights"].items():
        for measure, bound in (("Frobenius", policy.norm), ("spectral", policy.spectral)):
            least, most = measures[measure]["least"], measures[measure]["most"]
            if not 1 / bound <= least <= most <= bound:
                found.append(
                    f"the {measure} norm of {name} is {least:.2f} to {most:.2f} of the anchor's; expected {1 / bound:.2f} to {bound:.2f}"
                )
        if not measures["cosine"]["least"] >= policy.cosine:
            found.append(
                f"{name} has little in common with the anchor's (cosine {measures['cosine']['least']:.2f}; expected {policy.cosine})"
            )
    rows = report["row_norm_of_the_anchors"]
    if not rows["most"] <= policy.row_norm:
        found.append(f"a router row is {rows['most']:.1f} times as long as the anchor's; expected at most {policy.row_norm:.1f} times")
    if not report["public_share"] <= policy.public_share:
        found.append(
            f"it takes {report['public_share']:.0%} of the routing weight on public text; expected at most {policy.public_share:.0%}"
        )
    bits = report["public_bits_per_byte"]
    worse = bits["with_the_expert"] / bits["anchor"] - 1
    if not worse <= policy.public_loss:
        found.append(f"bits per byte of public text get {worse:.1%} worse with it; expected at most {policy.public_loss:.0%}")
    return found
