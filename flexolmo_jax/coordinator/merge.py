"""Merging: anchor + contributions -> one mixture-of-experts model, without data and without training; and taking experts out.

Experts stand behind the anchor's along the expert axis; the trunk is the anchor's, byte for byte. The order of contributions decides
expert indices and nothing else. Contributions are taken into the store once, verified; a model is then composed of files (see
store.py). Dropping an expert leaves its files out: what is left are the files of the model that never had it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.artifact import DEFAULT_ACTIVE, Artifact, active_among, open_artifact, write_description
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.records import sha256_of
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.admission import admit
from flexolmo_jax.exchange.anchor import layouts, open_anchor, tensor_digest
from flexolmo_jax.exchange.contribution import Contribution, open_contribution
from flexolmo_jax.exchange.screening import check_screening
from flexolmo_jax.exchange.signature import ANY, Trust
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.files import WAYS, check_new, new_directory
from flexolmo_jax.storage.paths import absolute
from flexolmo_jax.storage.weights import Reader, metadata_files

from .receipt import make_receipt, write_receipt
from .store import STORE, Source, Store, anchor_key, compose, expert_key


def merge(
    anchor_path: Path,
    contribution_paths: Sequence[Path],
    out: Path,
    *,
    active: int | None = None,
    store_path: Path | None = None,
    trust: Trust = ANY,
    admission: bool = True,
    screening: Sequence[Path] = (),
    ways: Sequence[str] = WAYS,
) -> Artifact:
    """Writes the merged model. `active` is the stored number of experts a token uses (default: 4, or all if there are fewer); `store_path`
    is by default `flexolmo-store` beside the model; `ways` are those of `compose`. Each contribution is tried (`admit`), unless `admission`
    is False; with `screening`, verdicts of the other owners, `check_screening` decides on it too.

    Raises UserError, before any tensor is read, for a contribution to another anchor, one that is expired or not trusted, a name
    given twice, and `active` above E; and for tensors, the anchor's or a contribution's, that are not what their digests say.
    """
    check_new(out)
    anchor = open_anchor(anchor_path)
    contributions = [_admitted(path, anchor, trust) for path in contribution_paths]
    description = _description(anchor.description, anchor.description["tensors"], [_member(c) for c in contributions], active)
    _try(contributions, anchor, trust, admission, screening)
    store = Store(store_path or absolute(out).parent / STORE)
    with store.shared():
        trunk = store.anchor(anchor)
        sources = [Source(trunk, 0), *(Source(store.expert(c), 0) for c in contributions)]
        return _compose(out, description, anchor, trunk, sources, store, ways)


def opt_out(
    model_path: Path,
    names: Sequence[str],
    out: Path,
    *,
    untuned: bool = False,
    store_path: Path | None = None,
    ways: Sequence[str] = WAYS,
) -> Artifact:
    """Writes the model without these experts, exactly the merge that never had them, and in it the receipt.

    `model_path` may be a router run: the model then has its tuned rows. These bear a trace of the experts that were there when they were
    tuned; `untuned` takes the rows that were contributed instead, from the store. Raises UserError for a name the model does not have,
    for the anchor's, and where an expert that stays has the same weights.
    """
    check_new(out)
    model, tuning = _tuned(model_path)
    model.check_experts(names)
    kept = [i for i, name in enumerate(model.experts) if name not in names]
    members = [model.description["members"][i - 1] for i in kept[1:]]
    store = _store(model, store_path)
    with store.shared():
        if untuned:
            tuning, sources = Tuning(), _contributed(model, members, store)
        else:
            sources = [Source(model.path / "weights", i) for i in kept]
        receipt = make_receipt(model, members, names, tuning.traces, store)
        return _changed(model, out, members, sources, store, ways, tuning=tuning, kept=kept, receipt=receipt)


def apply_tuning(run: Path, out: Path, *, store_path: Path | None = None, ways: Sequence[str] = WAYS) -> Artifact:
    """Writes the model of a router run, with the rows that it tuned. Raises UserError for another run."""
    check_new(out)
    model, tuning = _tuned(run)
    if not tuning.rows:
        raise UserError(f"{run} is not a router run; expected the directory of a `run: router`")
    kept = range(len(model.experts))
    sources = [Source(model.path / "weights", i) for i in kept]
    store = _store(model, store_path)
    with store.shared():
        return _changed(model, out, model.description["members"], sources, store, ways, tuning=tuning, kept=kept)


def undo_tuning(model_path: Path, out: Path, *, store_path: Path | None = None, ways: Sequence[str] = WAYS) -> Artifact:
    """Writes the model with the rows that were contributed, from the store: what `merge` gave. Raises UserError where it lacks one."""
    check_new(out)
    model = open_model(model_path)
    members = model.description["members"]
    store = _store(model, store_path)
    with store.shared():
        return _changed(model, out, members, _contributed(model, members, store), store, ways, tuning=Tuning())


def replace(
    model_path: Path,
    contribution: Path,
    out: Path,
    *,
    store_path: Path | None = None,
    trust: Trust = ANY,
    admission: bool = True,
    screening: Sequence[Path] = (),
    ways: Sequence[str] = WAYS,
) -> Artifact:
    """Writes the model with another contribution in the place of the expert of the same name. Raises UserError as `merge` does."""
    return _with_contribution(model_path, contribution, out, store_path, trust, admission, screening, ways, new=False)


def append(
    model_path: Path,
    contribution: Path,
    out: Path,
    *,
    store_path: Path | None = None,
    trust: Trust = ANY,
    admission: bool = True,
    screening: Sequence[Path] = (),
    ways: Sequence[str] = WAYS,
) -> Artifact:
    """Writes the model with one more expert, the last. Raises UserError as `merge` does."""
    return _with_contribution(model_path, contribution, out, store_path, trust, admission, screening, ways, new=True)


def open_model(path: Path) -> Artifact:
    """Opens a merged model. Raises UserError for anything else."""
    artifact = open_artifact(path)
    if artifact.kind != "model":
        raise UserError(f"{path} is a {artifact.kind}; expected a merged model (`flexolmo merge` makes one)")
    return artifact


def _with_contribution(
    model_path: Path,
    path: Path,
    out: Path,
    store_path: Path | None,
    trust: Trust,
    admission: bool,
    screening: Sequence[Path],
    ways: Sequence[str],
    *,
    new: bool,
) -> Artifact:
    check_new(out)
    model, tuning = _tuned(open_model(model_path).path)
    contribution = _admitted(path, model, trust)
    members = list(model.description["members"])
    sources = [Source(model.path / "weights", i) for i in range(len(model.experts))]
    if not new and contribution.name not in model.experts:
        raise UserError(f"no expert {contribution.name!r} in {model.path}; it has {', '.join(model.experts)}; `flexolmo append` adds one")
    place = len(sources) if new else model.experts.index(contribution.name)
    members[place - 1 : place] = [_member(contribution)]
    _check_names(members)
    _try([contribution], model, trust, admission, screening)
    store = _store(model, store_path)
    with store.shared():
        sources[place : place + 1] = [Source(store.expert(contribution), 0)]
        return _changed(model, out, members, sources, store, ways, tuning=tuning)


class Tuning(NamedTuple):
    """What a router was tuned to, and what of: the experts that were there and the data, by name. Those who leave leave a trace in it."""

    traces: tuple[str, ...] = ()
    rows: Mapping[str, np.ndarray] = MappingProxyType({})  # rows and biases of a router run; of a model, they are in its weights


def _tuned(path: Path) -> tuple[Artifact, Tuning]:
    """A merged model, or the model of a router run; and how it was tuned."""
    artifact = open_artifact(path)
    model = artifact.base() if artifact.description.get("run") == "router" else artifact
    model = open_model(model.path)
    traces = dict.fromkeys(model.description.get("router", {}).get("tuned_with", ()))
    if artifact.path == model.path:
        return model, Tuning(tuple(traces))
    traces |= dict.fromkeys([*model.experts, *artifact.description.get("data", ())])
    return model, Tuning(tuple(traces), {name: np.asarray(a, model.dtype) for name, a in flatten(artifact.trained()).items()})


def _contributed(model: Artifact, members: Sequence[dict[str, Any]], store: Store) -> list[Source]:
    """The anchor and these members as they were taken in."""
    anchor = store.held(anchor_key(model.description["anchor"]), "the model's anchor")
    experts = [store.held(expert_key(member["tensors"]), f"the contribution of {member['name']!r}") for member in members]
    return [Source(weights, 0) for weights in (anchor, *experts)]


def _admitted(path: Path, base: Artifact, trust: Trust) -> Contribution:
    contribution = open_contribution(path)
    contribution.check(base, trust)
    return contribution


def _try(contributions: Sequence[Contribution], base: Artifact, trust: Trust, admission: bool, screening: Sequence[Path]) -> None:
    """What is not in the manifests: what other owners say of an expert, and what it computes."""
    if screening:
        check_screening(contributions, screening, trust)
    if not admission:
        note("warning: --no-admission: the sizes of the experts' weights, and whether what they compute is finite, are not looked at")
        return
    for contribution in contributions:
        admit(contribution, base)


def _store(model: Artifact, path: Path | None) -> Store:
    return Store(path or absolute(model.path).parent / STORE)


def _changed(
    model: Artifact,
    out: Path,
    members: list[dict[str, Any]],
    sources: Sequence[Source],
    store: Store,
    ways: Sequence[str],
    *,
    tuning: Tuning,
    kept: Sequence[int] = (),
    receipt: dict[str, Any] | None = None,
) -> Artifact:
    """The model with other members."""
    active = active_among(model.config, len(sources))
    base = model.description
    description = _description(base, base["anchor"], members, active)
    rows = {}
    if tuning.traces:
        for path in ("experts/row", "experts/bias"):
            if path in description["tensors"] and tuning.rows:
                rows[path] = tuning.rows[path][:, kept]
            elif path in description["tensors"]:
                rows[path] = np.stack([_row(path, source, description) for source in sources], axis=1)
        tensors = {path: tensor_digest(a) for path, a in rows.items()}
        description["router"] = {"tuned_with": list(tuning.traces), "tensors": tensors}
    return _compose(out, description, model, model.path / "weights", sources, store, ways, rows, receipt)


def _row(path: str, source: Source, description: dict[str, Any]) -> np.ndarray:
    """An expert's rows or biases, of all layers."""
    reader, entry = Reader(source.weights), description["tensors"][path]
    if not reader.has(path):
        return np.zeros([n for axis, n in enumerate(entry["shape"]) if axis != 1], entry["dtype"])
    return reader.read(path, (slice(None), slice(source.index, source.index + 1)))[:, 0]


def _member(contribution: Contribution) -> dict[str, Any]:
    """What a model keeps of a manifest, for licences and receipts."""
    keys = ("name", "owner", "domain", "licence", "expires", "router_bias", "tensors", "training", "privacy")
    return {key: contribution.manifest[key] for key in keys} | {"manifest": contribution.manifest["sha256"]}


def _check_names(members: Sequence[dict[str, Any]]) -> None:
    names = [member["name"] for member in members]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two experts are called {name!r}; give each contribution a name of its own")


def _description(base: dict[str, Any], anchor: dict[str, Any], members: list[dict[str, Any]], active: int | None) -> dict[str, Any]:
    """Of a model of these members; `anchor` are the anchor's tensors."""
    _check_names(members)
    names = ["anchor", *(m["name"] for m in members)]
    if active is not None and not 1 <= active <= len(names):
        raise UserError(f"--active is {active}; expected 1 to {len(names)}, the number of experts ({', '.join(names)})")
    has_bias = any(m["router_bias"] for m in members)
    model = base["model"] | {
        "n_experts": len(names),
        "n_active": active or min(len(names), DEFAULT_ACTIVE),
        "router_bias": has_bias,
    }
    tensors = {path: {"dtype": entry["dtype"], "shape": list(entry["shape"])} for path, entry in anchor.items()}
    for path, entry in tensors.items():
        if path.startswith("experts/"):
            entry["shape"][1] = len(names)
    if has_bias:
        row = tensors["experts/row"]
        tensors["experts/bias"] = {"dtype": row["dtype"], "shape": row["shape"][:2]}
    return {
        "kind": "model",
        "model": model,
        "experts": names,
        "members": members,
        "anchor": anchor,
        "fingerprint": base["fingerprint"],
        "tokenizer": base["tokenizer"],
        "tensors": tensors,
    }


def _compose(
    out: Path,
    description: dict[str, Any],
    base: Artifact,
    trunk: Path,
    sources: Sequence[Source],
    store: Store,
    ways: Sequence[str],
    rows: dict[str, np.ndarray] | None = None,
    receipt: dict[str, Any] | None = None,
) -> Artifact:
    store.register(out)  # first: what a killed process leaves beside it can then be found
    with new_directory(out) as directory:
        base.tokenizer.save(directory / "tokenizer.json")
        target = layouts(ModelConfig(**description["model"]), description["tensors"])
        taken = compose(directory / "weights", target, trunk, sources, ways, rows)
        small = ["tokenizer.json", *(f"weights/{name}" for name in metadata_files(target))]
        files = {name: sha256_of(directory / name) for name in small}
        if receipt is not None:
            write_receipt(directory, receipt)
        write_description(directory, description | {"files": files})
    note(f"composed {out}: {', '.join(f'{n} files by {way}' for way, n in taken.items())}")
    return open_artifact(out)
