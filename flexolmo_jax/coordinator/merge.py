"""Merging: anchor + contributions -> one mixture-of-experts model, without data or training.

The store takes in each contribution once, verified. Every verb then turns one composition
(composition.py) into another and writes it. A model without an expert has exactly the files of the
model that never had it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flexolmo_jax.artifact import Artifact, open_artifact, sealed_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.contribution import Contribution
from flexolmo_jax.exchange.manifest import check_newer
from flexolmo_jax.exchange.signature import load_key, sign
from flexolmo_jax.integrity import RECEIPT, RECEIPT_SIGNATURE, tensors_of
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.storage.outputs import check_new
from flexolmo_jax.storage.paths import absolute, takes_paths
from flexolmo_jax.storage.placing import WAYS

from .composition import Composition, Member, Tuning
from .gate import ANYBODY, Gate
from .materialize import StoredExpert
from .objects import anchor_key, expert_key, sketches_of
from .receipt import make_receipt
from .sketch import encoded
from .store import STORE, Store


@takes_paths
def merge(  # noqa: PLR0913 - the verb's options
    anchor_path: Path,
    contribution_paths: Sequence[Path],
    out: Path,
    *,
    active: int | None = None,
    gate: Gate = ANYBODY,
    store_path: Path | None = None,
    ways: Sequence[str] = WAYS,
) -> Artifact:
    """Writes the merged model.

    Args:
        active: how many experts a token uses (default: 4, or all if there are fewer).
        gate: what each contribution has to pass.
        store_path: the store (default: `flexolmo-store` beside the model).
        ways: how files get into the model, see `materialize`.

    Raises:
        UserError: before any expert's tensor is read, for a contribution to another anchor, one
            that is expired or not trusted, a name given twice, and more active experts than there
            are; then for tensors that differ from their digests.
    """
    check_new(out)
    anchor = open_anchor(anchor_path)
    contributions = [gate.open(path, anchor) for path in contribution_paths]
    store = Store.at(store_path or absolute(out).parent / STORE)
    planned = Composition.of_anchor(anchor, anchor.path / "weights", active)
    for contribution in contributions:
        if contribution.name in planned.experts:
            raise UserError(
                f"two experts are called {contribution.name!r}; give each contribution a name of"
                " its own"
            )
        planned = planned.with_member(_member(contribution), planned.stored[0])
    planned.describe()  # raises before anything is read or written
    gate.check(contributions, anchor)
    with store.shared():
        held = store.anchor(anchor)
        composition = Composition.of_anchor(anchor, held.weights, active)
        for contribution in contributions:
            composition = _taken_in(composition, contribution, store, held.sketches)
        return composition.write(out, store, ways)


@takes_paths
def opt_out(  # noqa: PLR0913 - the verb's options
    model_path: Path,
    names: Sequence[str],
    out: Path,
    *,
    untuned: bool = False,
    sign_key: Path | None = None,
    store_path: Path | None = None,
    ways: Sequence[str] = WAYS,
    base_at: Path | None = None,
) -> Artifact:
    """Writes the model without these experts, as the merge that never had them, and a receipt.

    Args:
        model_path: a model, or a router run, whose tuned rows the new model then has.
        untuned: take the contributed rows instead, from the store. Tuned rows bear a trace of the
            experts that were there when they were tuned.
        sign_key: the coordinator's private key, which signs the receipt.
        store_path, ways: as in `merge`.
        base_at: the model of a router run, if it is neither where it was nor beside the run as it
            was.

    Raises:
        UserError: for a name that the model does not have, for the anchor's, and where an expert
            that stays is a copy of one that leaves.
    """
    check_new(out)
    key = load_key(sign_key) if sign_key else None
    model, tuning = _tuned(model_path, base_at)
    model.check_experts(names)
    store = _store(model, store_path)
    composition = Composition.of_model(model, tuning).without(names)
    with store.shared():
        if untuned:
            composition = composition.untuned(_contributed(composition, store))
        receipt = sealed_json(make_receipt(model, composition, names, store)).encode()
        beside = {RECEIPT: receipt} | ({RECEIPT_SIGNATURE: sign(receipt, key)} if key else {})
        return composition.write(out, store, ways, beside)


@takes_paths
def apply_tuning(
    run: Path, out: Path, *, store_path: Path | None = None, ways: Sequence[str] = WAYS
) -> Artifact:
    """Writes the model with the rows that a router run tuned.

    Raises UserError for any other run.
    """
    check_new(out)
    model, tuning = _tuned(run)
    if not tuning.rows:
        raise UserError(f"{run} is not a router run; expected the directory of a `run: router`")
    store = _store(model, store_path)
    with store.shared():
        return Composition.of_model(model, tuning).write(out, store, ways)


@takes_paths
def undo_tuning(
    model_path: Path, out: Path, *, store_path: Path | None = None, ways: Sequence[str] = WAYS
) -> Artifact:
    """Writes the model with the contributed router rows, from the store, as `merge` did.

    Raises UserError where the store lacks one.
    """
    check_new(out)
    model, tuning = _tuned(open_model(model_path).path)
    store = _store(model, store_path)
    composition = Composition.of_model(model, tuning)
    with store.shared():
        return composition.untuned(_contributed(composition, store)).write(out, store, ways)


@takes_paths
def replace(  # noqa: PLR0913 - the verb's options
    model_path: Path,
    contribution: Path,
    out: Path,
    *,
    allow_older: bool = False,
    gate: Gate = ANYBODY,
    store_path: Path | None = None,
    ways: Sequence[str] = WAYS,
) -> Artifact:
    """Writes the model with a newer contribution in place of the expert of the same name.

    With `allow_older` the contribution may be an older one. Raises UserError as `merge` does.
    """
    check_new(out)
    model, tuning = _tuned(open_model(model_path).path)
    newer = gate.open(contribution, model)
    if newer.name not in model.experts:
        raise UserError(
            f"no expert {newer.name!r} in the model; it has {', '.join(model.experts)}; `flexolmo"
            " append` adds one"
        )
    composition = _planned(model, tuning, newer)
    if not allow_older:
        check_newer(model.members[model.experts.index(newer.name) - 1], newer.manifest)
    gate.check([newer], model)
    return _with_contribution(composition, model, newer, _store(model, store_path), out, ways)


@takes_paths
def append(
    model_path: Path,
    contribution: Path,
    out: Path,
    *,
    gate: Gate = ANYBODY,
    store_path: Path | None = None,
    ways: Sequence[str] = WAYS,
) -> Artifact:
    """Writes the model with one more expert, the last. Raises UserError as `merge` does."""
    check_new(out)
    model, tuning = _tuned(open_model(model_path).path)
    more = gate.open(contribution, model)
    if more.name in model.experts:
        raise UserError(
            f"{model_path} already has an expert {more.name!r}; `flexolmo replace` renews it"
        )
    composition = _planned(model, tuning, more)
    gate.check([more], model)
    return _with_contribution(composition, model, more, _store(model, store_path), out, ways)


@takes_paths
def open_model(path: Path) -> Artifact:
    """Opens a merged model for use.

    Raises UserError for anything else, and where its bytes are not those of its description.
    """
    artifact = open_artifact(path)
    if artifact.kind != "model":
        raise UserError(
            f"{path} is a {artifact.kind}; expected a merged model (`flexolmo merge` makes one)"
        )
    artifact.ensure()
    return artifact


def _planned(model: Artifact, tuning: Tuning, contribution: Contribution) -> Composition:
    """The composition of the model as it is.

    Raises UserError where the contribution cannot be added: nothing has been written yet.
    """
    composition = Composition.of_model(model, tuning)
    composition.with_member(_member(contribution), composition.stored[0]).describe()
    return composition


def _with_contribution(
    composition: Composition,
    model: Artifact,
    contribution: Contribution,
    store: Store,
    out: Path,
    ways: Sequence[str],
) -> Artifact:
    with store.shared():
        sketches = _anchor_sketches(composition, model, store)
        return _taken_in(composition, contribution, store, sketches).write(out, store, ways)


def _taken_in(
    composition: Composition, contribution: Contribution, store: Store, anchor_sketches: np.ndarray
) -> Composition:
    """The composition with a contribution, which the store takes in."""
    held = store.expert(contribution)
    member = _member(contribution, encoded(held.sketches - anchor_sketches))
    return composition.with_member(member, StoredExpert(held.weights, 0))


def _member(contribution: Contribution, sketch: str = "") -> Member:
    signature = contribution.signature
    return {
        "name": contribution.name,
        "manifest": contribution.manifest,
        "signature": None if signature is None else signature.decode("ascii"),
        "sketch": sketch,
    }


def _anchor_sketches(composition: Composition, model: Artifact, store: Store) -> np.ndarray:
    key = anchor_key(composition.anchor["tensors"])
    if store.holds(key):
        return store.held(key, "the anchor").sketches
    return sketches_of(model.path / "weights", model.config)


def _tuned(path: Path, base_at: Path | None = None) -> tuple[Artifact, Tuning]:
    """The merged model at `path`, or the model of the router run there, and its tuning."""
    artifact = open_artifact(path, base_at)
    model = artifact.base() if artifact.description.get("run") == "router" else artifact
    model = open_model(model.path)
    traces = dict.fromkeys(model.description.get("router", {}).get("tuned_with", ()))
    if artifact.path == model.path:
        return model, Tuning(tuple(traces))
    traces |= dict.fromkeys([*model.experts, *artifact.description.get("data", ())])
    rows = {path: np.asarray(a, model.dtype) for path, a in flatten(artifact.trained()).items()}
    return model, Tuning(tuple(traces), rows)


def _contributed(composition: Composition, store: Store) -> list[StoredExpert]:
    """The anchor and the members in the store, as they were contributed."""
    held = [store.held(anchor_key(composition.anchor["tensors"]), "the model's anchor")]
    for member in composition.members:
        key = expert_key(tensors_of(member))
        held.append(store.held(key, f"the contribution of {member['name']!r}"))
    return [StoredExpert(each.weights, 0) for each in held]


def _store(model: Artifact, path: Path | None) -> Store:
    return Store.at(path or absolute(model.path).parent / STORE)
