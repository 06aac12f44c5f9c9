"""Packaging: an owner's pair run, or an expert of an imported model, becomes a contribution."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jax.sharding import Mesh

from flexolmo_jax.artifact import Artifact, Which, open_artifact, placement_on, places_of
from flexolmo_jax.config import Dataset, MeshConfig, RunConfig, read_config, to_dict
from flexolmo_jax.data.prepare import open_heldout
from flexolmo_jax.data.records import Part, open_records
from flexolmo_jax.data.tokens import Source
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.contribution import (
    MANIFEST,
    SIGNATURE,
    TENSORS,
    Contribution,
    open_contribution,
    read_manifest,
    sealed,
    tensor_shapes,
)
from flexolmo_jax.exchange.manifest import FORMAT
from flexolmo_jax.exchange.placing import place_expert
from flexolmo_jax.exchange.signature import load_key, sign
from flexolmo_jax.integrity import (
    anchor_tensors,
    layouts,
    leaf_of,
    name_of_tensor,
    tensor_digest,
)
from flexolmo_jax.model import Params
from flexolmo_jax.runtime.environment import package_version
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.runtime.sharding import make_mesh
from flexolmo_jax.storage.files import new_directory, write_bytes
from flexolmo_jax.storage.outputs import check_new
from flexolmo_jax.storage.paths import is_there, path_of, takes_paths
from flexolmo_jax.storage.tensorfile import TensorFile, finite, write_tensors
from flexolmo_jax.storage.weights import Stored
from flexolmo_jax.train.evaluate import score_model
from flexolmo_jax.train.sources import evaluation_sources


@takes_paths
def package(
    path: Path,
    out: Path,
    which: str = "last",
    sign_key: Path | None = None,
    mesh: MeshConfig | None = None,
    anchor: Path | None = None,
) -> Contribution:
    """Makes a contribution of a pair's run.

    The expert is cast to the anchor's dtype first and then evaluated, so that what was measured is
    what is merged. As in `eval`, it is evaluated in float32, whatever the run computed in. On the
    devices are the anchor and the expert in the anchor's dtype; in the host's memory is one
    parameter of the expert, of all layers.

    Args:
        path: the pair's run.
        out: the contribution's directory.
        which: the checkpoint: "last", "best", or a step.
        sign_key: the owner's private key.
        mesh: the devices that the pair's weights are spread over. Default: the run's own mesh, or
            all devices along fsdp where that does not fit them.
        anchor: the anchor's directory, if it is neither where it was nor beside the run as it was.

    Raises:
        UserError: for any other run, another anchor, a wrong key, scores that are not finite, and a
            mesh that does not fit the devices.
    """
    check_new(out)
    key = load_key(sign_key) if sign_key else None
    run = dataclasses.replace(open_artifact(path), base_at=anchor)
    if not run.is_pair:
        raise UserError(
            f"{path} is not a pair's run; expected one, or an imported model with --expert NAME"
        )
    config = _config_of(path, run)
    base = open_anchor(run.base().path)
    steps = run.steps(which)
    devices = make_mesh(mesh) if mesh else _mesh_of(config)
    placement = placement_on(devices, run.config, pair=True)
    expert = place_expert(_released(run, steps, base.dtype), run.config, placement)
    pair = base.params(placement=placement) | {"expert": expert}
    scores = _evaluate(run, base, pair, _located(config, run), devices)
    fields = _fields(config, steps[-1], scores)

    def tensor(leaf: str, layer: int) -> np.ndarray:
        return np.asarray(expert[leaf][layer, 0])

    return _hand_over(out, base, fields, "bias" in expert, tensor, key)


def _config_of(path: Path, run: Artifact) -> RunConfig:
    """The config of a pair's run. Raises UserError for that of another run."""
    config = read_config(path / "config.yaml")
    if config.pair is None or ("anchor", config.pair.name) != run.experts:
        got = "no pair" if config.pair is None else f"the pair of {config.pair.name!r}"
        raise UserError(
            f"{path / 'config.yaml'} describes {got}; the run trained {run.experts[1]!r};"
            " restore the run's own config.yaml"
        )
    return config


def _located(config: RunConfig, run: Artifact) -> RunConfig:
    """A pair's config with its data where they lie now: where they were, or beside the run, if all
    of it was moved or copied. Their names stay."""
    inputs = run.description.get("inputs", {})  # runs of earlier versions have none

    def is_it(place: str | Path, read: Mapping[str, str]) -> bool:
        if place == read["path"]:
            return is_there(path_of(place))
        try:
            source = open_heldout(path_of(place), run.tokenizer, config.data.seq_len)
        except UserError:
            return False
        return source.content.sha256 == read["sha256"]

    def place(key: str, path: str) -> str:
        if not path or (read := inputs.get(key)) is None:
            return path
        found = (str(p) for p in places_of(run.path, read["path"]) if is_it(p, read))
        return next(found, path)

    data = config.data
    train, heldout = (
        tuple(dataclasses.replace(source, name=source.title) for source in sources)
        for sources in (data.train, data.eval)
    )
    data = dataclasses.replace(data, train=train, eval=heldout)
    return dataclasses.replace(config, data=data).reading(place)


def _fields(config: RunConfig, step: int, scores: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of the owner and of how the expert was made."""
    pair, data = config.pair, config.data
    assert pair is not None
    return {
        "name": pair.name,
        "owner": pair.owner,
        "domain": pair.domain or pair.name,
        "licence": pair.licence,
        "expires": pair.expires or None,
        "training": {
            "steps": step,
            "tokens": step * data.batch_size * data.seq_len,
            "public_share": pair.public_share,
            "bits_per_byte": scores,
        },
        "sequence": pair.sequence,
    }


def _released(run: Artifact, which: Which, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """The expert's tensors by their names in a contribution, cast to the anchor's dtype."""
    for path, array in run.arrays(which).items():
        branch, leaf = path.rsplit("/", 1)
        if branch == "expert":
            for layer in range(run.config.n_layers):
                name = name_of_tensor(leaf, layer)
                yield name, finite(array[layer, 0], name, dtype)


def _mesh_of(config: RunConfig) -> Mesh:
    """The run's own mesh, or all devices along fsdp where that does not fit them."""
    try:
        return make_mesh(config.mesh)
    except UserError:
        return make_mesh(MeshConfig())


@takes_paths
def package_imported(
    model_path: Path, name: str, anchor_path: Path, out: Path, sign_key: Path | None = None
) -> Contribution:
    """Makes a contribution of an expert of an imported model, a tensor at a time.

    The anchor is the one published from that model. The values are the model's, cast to the
    anchor's dtype. Raises UserError for a model that was not imported, an expert it does not have,
    and another anchor.
    """
    check_new(out)
    key = load_key(sign_key) if sign_key else None
    model, anchor = open_artifact(model_path), open_anchor(anchor_path)
    if model.kind != "model" or model.fingerprint is not None:
        raise UserError(
            f"{model_path} is not an imported model; expected one that `flexolmo import-hf` made,"
            " or a pair's run without --expert"
        )
    model.check_experts([name])
    arrays = {path: array.astype(anchor.dtype) for path, array in model.arrays().items()}
    for path, entry in anchor.description["tensors"].items():
        if _digest(model, path, arrays[path], anchor.dtype) != entry["sha256"]:
            raise UserError(
                f"{anchor_path} is not the anchor of {model_path}: {path} differs; give what"
                f" `flexolmo publish` made of {model_path}"
            )
    index = model.experts.index(name)
    fields = {
        "name": name,
        "owner": "unspecified",
        "domain": name,
        "licence": "unspecified",
        "expires": None,
        "training": {"imported": model.description["imported"]},
        "sequence": 1,
    }

    def tensor(leaf: str, layer: int) -> np.ndarray:
        return finite(arrays[f"experts/{leaf}"][layer, index], name_of_tensor(leaf, layer))

    return _hand_over(out, anchor, fields, False, tensor, key)


def _hand_over(
    out: Path,
    anchor: Artifact,
    fields: dict[str, Any],
    has_bias: bool,
    tensor: Callable[[str, int], np.ndarray],
    key: Ed25519PrivateKey | None,
) -> Contribution:
    """Writes a contribution, whose tensors `tensor(leaf, layer)` gives.

    `fields` are the manifest's keys that say who made the expert and how.
    """
    shapes = dict(sorted(tensor_shapes(anchor.config, has_bias).items()))
    entries: dict[str, Any] = {}

    def tensors() -> Iterator[np.ndarray]:
        for name in shapes:
            path, layer = leaf_of(name)
            values = np.asarray(tensor(path.removeprefix("experts/"), layer))
            entries[name] = {
                "dtype": str(values.dtype),
                "shape": list(values.shape),
                "sha256": tensor_digest(values),
            }
            yield values

    with new_directory(out) as directory:
        released = {name: (anchor.dtype, shape) for name, shape in shapes.items()}
        write_tensors(directory / TENSORS, released, tensors())
        with TensorFile(directory / TENSORS) as file:
            header = file.header_sha256
        told = {"router_bias": has_bias, "tensors": entries, "header": header}
        text = _manifest(fields | told, anchor)
        write_bytes(directory / MANIFEST, text)
        if key:
            write_bytes(directory / SIGNATURE, sign(text, key))
    size = sum(math.prod(shape) for shape in shapes.values()) * np.dtype(anchor.dtype).itemsize
    note(f"packaged {out}: {size:,} bytes of weights, no data")
    contribution = open_contribution(out)
    if (day := contribution.expired) is not None:
        note(f"warning: nobody can merge {out}: its licence expired on {day} (pair.expires)")
    return contribution


def _manifest(fields: dict[str, Any], anchor: Artifact) -> bytes:
    """The bytes of a manifest. Raises UserError for one that a coordinator would refuse."""
    of_all = {
        "format": FORMAT,
        "anchor": anchor.fingerprint,
        "model": to_dict(anchor.config),
        "dtype": anchor.dtype,
        "privacy": "none",  # training here gives no differential privacy
        "tool": f"flexolmo-jax {package_version()}",
    }
    text = sealed(fields | of_all)
    try:
        read_manifest(text)
    except ValueError as error:
        raise UserError(f"no contribution can be made of this expert: {error}") from None
    return text


def _digest(model: Artifact, path: str, array: Stored, dtype: str) -> str:
    """The digest of the anchor's part of an array, in this dtype.

    The array is read only if the model has another dtype, whose digest does not help.
    """
    if model.dtype == dtype:
        return anchor_tensors(model.description)[path]["sha256"]
    anchors = dataclasses.replace(array, expert=0) if path.startswith("experts/") else array
    digest = hashlib.sha256()
    layout = layouts(model.config, {path: {"dtype": dtype, "shape": anchors.shape}})[path]
    for box in layout.boxes():
        digest.update(np.ascontiguousarray(anchors[box]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _evaluate(
    run: Artifact, anchor: Artifact, pair: Params, config: RunConfig, mesh: Mesh
) -> dict[str, Any]:
    """Bits per byte of anchor and pair on held-out text, the owner's and public text."""
    assert config.pair is not None
    public = Dataset(path=config.pair.public or str(anchor.path / "public"), name="public")
    data = config.data

    def opened(dataset: Dataset, part: Part) -> Source:
        # An owner's records need not be as long as the anchor's public ones.
        how: dict[str, Any] = {"reading": data.reading, "dtype": dataset.dtype}
        return open_heldout(path_of(dataset.path), run.tokenizer, data.seq_len, part, **how)

    own = (opened(dataset, "train") for dataset in (*data.train, public))
    learnt = itertools.chain(own, (open_records(anchor.path / "public", "train"),))
    dense = {name: branch for name, branch in pair.items() if name != "expert"}
    models = {"anchor": (anchor.config, dense), "pair": (run.config, pair)}
    scores: dict[str, Any] = {who: {} for who in models}
    how: dict[str, Any] = {"loss": data.loss, "limit": config.train.eval_records, "mesh": mesh}
    for name, records in evaluation_sources(data, [public], opened, learnt).items():
        run.warn_of_length(records.seq_len, f"{records.path} has records")
        for who, model in models.items():
            score = score_model(*model, records, run.tokenizer, **how)
            scores[who][name] = round(score.bits_per_byte, 6)
    return scores
