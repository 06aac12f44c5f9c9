"""Trying an expert before it is merged: its weights, and what it does to public text.

Digests and signatures say who made an expert, not that it is good. There are two checks of that, a
cheap one and a full one:

    admit(contribution, anchor)                 # part of every merge: sane norms, finite results
    admission(contribution, anchor, public)     # a report on weights, routing and public text

Both compare the weights with the anchor's, from which every expert starts, and run anchor and
expert together. `admit` keeps one layer in memory at a time. What is outside the policy's bounds is
a finding.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.artifact import Artifact, placement_on
from flexolmo_jax.config import MeshConfig, ModelConfig
from flexolmo_jax.data.documents import INDEX_FILE
from flexolmo_jax.data.prepare import open_heldout
from flexolmo_jax.data.records import open_records
from flexolmo_jax.data.sample import sample_of, tell_heldout
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.bits_per_byte import raw_seq_len
from flexolmo_jax.integrity import MATRICES, layouts, leaf_of, name_of_tensor
from flexolmo_jax.loaded import LoadedModel, load
from flexolmo_jax.model import Params, forward_layer
from flexolmo_jax.model.tree import unflatten
from flexolmo_jax.storage import verified
from flexolmo_jax.storage.weights import Stored
from flexolmo_jax.train.evaluate import score_model

from .contribution import Contribution
from .placing import place_expert

RECORDS = 64  # of public text, at most
ITERATIONS = 16  # of the power method: the largest singular value to a few percent
TRIED = 2, 64  # records and their tokens: as many random ones as of the anchor's public text


@dataclass(frozen=True)
class Policy:
    """Bounds of what needs no second look; in brackets, the values of the four demo experts."""

    # the Frobenius norm is at most this multiple of the anchor's, at least 1 / it (1.4 to 1.6)
    norm: float = 3.0
    spectral: float = 4.0  # the same of the largest singular value (1.0 to 1.7)
    cosine: float = 0.2  # of an expert's matrix and the anchor's, at least (0.63 to 0.79)
    row_norm: float = 25.0  # a router row's length over the anchor's, at most (4.1 to 7.4)
    # the expert's mean probability on public text beside the anchor, at most (0.11 to 0.29)
    public_share: float = 0.75
    # the relative rise of bits per byte of public text, at most (0.007 to 0.012)
    public_loss: float = 0.05


DEFAULT = Policy()
# A merge refuses only norms beyond this multiple of the policy's bounds. Those call for a second
# look, which nobody takes during a merge, and norms grow with training: an expert of the demo would
# have to grow eightfold to be refused. The wider bound still keeps results finite: every branch is
# normed, so each layer's input is bounded, and no product of it with three matrices 12 times as
# large comes near float32's largest number (3e38).
MARGIN = 4.0


def admit(contribution: Contribution, anchor: Artifact) -> None:
    """Refuses an expert whose norms no trained expert has, or whose outputs are not finite.

    `anchor` may be a model made from it. Every tensor of the contribution is read and checked, but
    files that were admitted and have not changed since are not read again. In memory are one layer
    of both as stored, and its matrices in float32. Raises UserError as `Contribution.tensors` does,
    and for findings.
    """
    claim = (
        f"admitted {contribution.manifest['sha256']} to {anchor.fingerprint} within {MARGIN}"
        f" {DEFAULT}"
    )
    verified.once(contribution.path, claim, lambda: _admit(contribution, anchor))


def _admit(contribution: Contribution, anchor: Artifact) -> None:
    config = dataclasses.replace(
        anchor.config, n_experts=1, n_active=1, router_bias=contribution.has_bias
    )
    leaves = (*MATRICES, "row", *(["bias"] if contribution.has_bias else []))
    layers = range(config.n_layers)
    order = [name_of_tensor(leaf, layer) for layer in layers for leaf in leaves]
    theirs = contribution.tensors(order=order)
    ours: dict[str, Stored] = anchor.arrays()
    tokens, segments = _texts(anchor)
    x = _embedded(anchor, tokens)
    for layer in layers:
        # no name for the layer's arrays here: it would keep them while the next layer's are read
        x, findings = _try_layer(
            config,
            layer,
            ours,
            {leaf: _on_device(next(theirs)[1][None]) for leaf in leaves},
            x,
            segments,
        )
        if findings:
            raise UserError(
                f"{contribution.path} is not admitted: {'; '.join(findings)}; ask its owner for an"
                " expert that works"
            )


def _try_layer(
    config: ModelConfig,
    layer: int,
    ours: Mapping[str, Stored],
    expert: Params,
    x: np.ndarray,
    segments: np.ndarray,
) -> tuple[np.ndarray, list[str]]:
    """The layer's output and the findings. Frees its weights before the next layer's are read."""
    stacked = "trunk/layers/"
    trunk = {
        path.removeprefix(stacked): _on_device(a[layer])
        for path, a in ours.items()
        if path.startswith(stacked)
    }
    anchors = {
        name: _on_device(ours[f"experts/{name}"][layer, slice(0, 1)]) for name in (*MATRICES, "row")
    }
    norms = {name: (_norm(expert[name]), _norm(anchors[name])) for name in anchors}
    findings = _norm_findings(layer, norms)
    params = {"layer": unflatten(trunk), "experts": anchors, "expert": expert}
    y = np.asarray(_compiled_layer(config)(params, x, segments, config.has_window(layer)))
    if broken := int((~np.isfinite(y).all(axis=-1) & (segments != 0)).sum()):
        made = (
            f"layer {layer} gives numbers that are not finite for {broken} of"
            f" {np.count_nonzero(segments)} tokens; expected none"
        )
        findings = findings or [made]
    return y, findings


def _norm_findings(layer: int, norms: Mapping[str, tuple[float, float]]) -> list[str]:
    """Findings on the norms of each of the expert's tensors and the anchor's."""
    found = []
    for name, (theirs, ours) in norms.items():
        ratio = theirs / max(ours, 1e-12)
        bound = MARGIN * (DEFAULT.row_norm if name == "row" else DEFAULT.norm)
        if not ratio <= bound:  # NaN is a finding too
            found.append(
                f"the norm of {name_of_tensor(name, layer)} is {ratio:.3g} times the anchor's;"
                f" expected at most {bound:.0f} times"
            )
    return found


@functools.lru_cache
def _compiled_layer(config: ModelConfig) -> Callable[..., jax.Array]:
    """Takes a layer's parameters, x, segments and whether it has a window."""
    return jax.jit(functools.partial(forward_layer, config))


def _on_device(array: np.ndarray) -> jax.Array:
    """A copy that JAX owns, so that the array in host memory is freed at once."""
    return jax.device_put(array).block_until_ready()


def _norm(array: jax.Array) -> float:
    scale, scaled = _scaled_norm(array)
    return float(scaled) / float(scale)


@jax.jit
def _scaled_norm(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A power of two, and the norm of the array times it.

    Without the scale, squares of large weights overflow float32.
    """
    scale = jnp.where(jnp.max(jnp.abs(array)) > 2.0**30, 2.0**-80, 1.0)
    # Vector by vector: a single sum of all squares would lose the small ones.
    norms = jnp.linalg.norm(array.astype(jnp.float32) * scale, axis=-1)
    return scale, jnp.linalg.norm(norms)


def _texts(anchor: Artifact) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments [B, T] to try an expert on.

    The first half is random, but always the same. The second is public text, if the anchor has any.
    """
    B, T = TRIED[0], min(TRIED[1], anchor.config.max_seq_len)
    tokens, segments = np.zeros((2 * B, T), np.int32), np.zeros((2 * B, T), np.int32)
    tokens[:B] = np.random.default_rng(0).integers(0, anchor.tokenizer.vocab_size, (B, T))
    segments[:B] = 1
    if (anchor.path / "public" / INDEX_FILE).exists():
        records = open_records(anchor.path / "public", "train")
        length = min(T, records.seq_len)
        for row, place in enumerate(sample_of(len(records), B), B):
            record = records[place]
            tokens[row, :length] = record["tokens"][:T]
            segments[row, :length] = record["segments"][:T]
    used = segments.any(axis=1)  # there may be fewer public records than B
    return tokens[used], segments[used]


def _embedded(anchor: Artifact, tokens: np.ndarray) -> np.ndarray:
    """The embeddings of tokens, float32 [B, T, D]; the table is read a shard at a time."""
    x = np.zeros((*tokens.shape, anchor.config.d_model), np.float32)
    path = "trunk/embedding"
    table: Stored = anchor.arrays()[path]
    layout = layouts(anchor.config, {path: anchor.description["tensors"][path]})[path]
    for ids, dims in layout.boxes():
        here = (ids.start <= tokens) & (tokens < ids.stop)
        x[here] = table[ids, dims][tokens[here] - ids.start]
    return x


def admission(
    contribution: Contribution,
    anchor: Artifact,
    public: Path,
    policy: Policy = DEFAULT,
    mesh: MeshConfig | None = None,
) -> dict[str, Any]:
    """The admission report of an expert: measures and findings.

    Every tensor is read and checked. Anchor and expert are on one device or spread over those of
    `mesh`; the host's memory holds a matrix of each. Raises UserError as `Contribution.tensors`
    does, for public data without held-out records, and for a mesh that does not fit the devices.
    """
    model = load(anchor.path, mesh=mesh)
    ours: dict[str, Stored] = model.artifact.arrays()
    config = dataclasses.replace(model.config, router_bias=contribution.has_bias)
    measures: dict[str, list[dict[str, float]]] = {name: [] for name in (*MATRICES, "row")}

    def measured() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in contribution.tensors():
            path, layer = leaf_of(name)
            if (leaf := path.removeprefix("experts/")) in measures:
                compare = _compare_rows if leaf == "row" else _compare
                measures[leaf].append(compare(tensor, ours[path][layer, 0]))
            yield name, tensor

    expert = place_expert(measured(), config, placement_on(model.mesh, config, pair=True))
    rows = _over_layers(measures.pop("row"))
    report = {
        "weights": {name: _over_layers(each) for name, each in measures.items()},
        "row_norm_of_the_anchors": rows["length"],
        **_trial(model, config, expert, public),
    }
    judged = {"findings": _findings(report, policy), "policy": dataclasses.asdict(policy)}
    return _in_json(report | judged)


def _trial(
    model: LoadedModel, with_expert: ModelConfig, expert: Params, public: Path
) -> dict[str, Any]:
    """Bits per byte of public text without and with the expert, and the expert's probability."""
    records = open_heldout(public, model.tokenizer, raw_seq_len(model))
    if not len(records):
        raise UserError(f"{public} has no held-out records; give more public text")
    tell_heldout(records, public)
    model.artifact.warn_of_length(records.seq_len, f"{public} has records")
    how: dict[str, Any] = {"mesh": model.mesh, "limit": RECORDS}
    before = score_model(model.config, model.params, records, model.tokenizer, **how)
    pair = model.params | {"expert": expert}
    after = score_model(with_expert, pair, records, model.tokenizer, **how)
    by_layer = after.routing[:, 1]
    bits = {"anchor": before.bits_per_byte, "with_the_expert": after.bits_per_byte}
    return {
        "public_tokens": after.tokens,
        "public_share": float(by_layer.mean()),
        "public_share_by_layer": by_layer.tolist(),
        "public_bits_per_byte": bits,
    }


def _compare(theirs: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """The measures of an expert's matrix, against the anchor's."""
    (theirs, their_scale), (ours, our_scale) = _scaled(theirs), _scaled(ours)
    scale = their_scale / our_scale
    their_norm, our_norm = float(np.linalg.norm(theirs)), float(np.linalg.norm(ours))
    largest, our_largest = _largest_singular_value(theirs), _largest_singular_value(ours)
    return {
        "Frobenius": scale * their_norm / max(our_norm, 1e-12),
        "spectral": scale * largest / max(our_largest, 1e-12),
        "cosine": float(np.vdot(theirs, ours)) / max(their_norm * our_norm, 1e-12),
    }


def _compare_rows(theirs: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """The same of a router row."""
    length, our_length = (float(np.linalg.norm(row.astype(np.float64))) for row in (theirs, ours))
    return {"length": length / max(our_length, 1e-12)}


def _over_layers(measures: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The least and the most of each measure over the layers."""
    return {name: _range([each[name] for each in measures]) for name in measures[0]}


def _scaled(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """A matrix in float32 divided by its largest magnitude, and that magnitude.

    Without the scale, squares of large weights overflow float32.
    """
    matrix = matrix.astype(np.float32)
    largest = float(np.abs(matrix).max()) or 1.0
    return matrix / largest, largest


def _largest_singular_value(matrix: np.ndarray) -> float:
    vector = np.random.default_rng(0).standard_normal(matrix.shape[1]).astype(np.float32)
    for _ in range(ITERATIONS):
        vector = matrix.T @ (matrix @ (vector / max(np.linalg.norm(vector), 1e-30)))
    return float(np.linalg.norm(vector) ** 0.5)


def _in_json(value: Any) -> Any:
    """A value for JSON, which has no numbers that are not finite: they become null."""
    if isinstance(value, dict):
        return {key: _in_json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_in_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _range(values: Any) -> dict[str, float]:
    return {"least": float(np.min(values)), "most": float(np.max(values))}


def _findings(report: Mapping[str, Any], policy: Policy) -> list[str]:
    found = []
    for name, measures in report["weights"].items():
        for measure, bound in (("Frobenius", policy.norm), ("spectral", policy.spectral)):
            least, most = measures[measure]["least"], measures[measure]["most"]
            if not 1 / bound <= least <= most <= bound:
                found.append(
                    f"the {measure} norm of {name} is {least:.2f} to {most:.2f} of the anchor's;"
                    f" expected {1 / bound:.2f} to {bound:.2f}"
                )
        if not measures["cosine"]["least"] >= policy.cosine:
            found.append(
                f"{name} has little in common with the anchor's (cosine"
                f" {measures['cosine']['least']:.2f}; expected {policy.cosine})"
            )
    rows = report["row_norm_of_the_anchors"]
    if not rows["most"] <= policy.row_norm:
        found.append(
            f"a router row is {rows['most']:.1f} times as long as the anchor's; expected at most"
            f" {policy.row_norm:.1f} times"
        )
    if not report["public_share"] <= policy.public_share:
        found.append(
            f"it takes {report['public_share']:.0%} of the mixture on public text; expected"
            f" at most {policy.public_share:.0%}"
        )
    bits = report["public_bits_per_byte"]
    worse = bits["with_the_expert"] / bits["anchor"] - 1
    if not worse <= policy.public_loss:
        found.append(
            f"bits per byte of public text get {worse:.1%} worse with it; expected at most"
            f" {policy.public_loss:.0%}"
        )
    return found
