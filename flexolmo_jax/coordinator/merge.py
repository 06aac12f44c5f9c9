"""Merging: anchor + contributions -> one mixture-of-experts model, without data and without
training; and taking experts out.

Contributions are taken into the store once, verified; every verb then makes one composition
(composition.py) into another, and writes it. Dropping an expert leaves its files out: what is left
are the files of the model that never had it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexolmo_jax.artifact import Artifact, open_artifact, sealed_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.admission import admit
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.contribution import Contribution, open_contribution
from flexolmo_jax.exchange.manifest import check_newer
from flexolmo_jax.exchange.screening import check_screening
from flexolmo_jax.exchange.signature import ANY, Trust, load_key, sign
from flexolmo_jax.integrity import RECEIPT, RECEIPT_SIGNATURE, tensors_of
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.files import check_new
from flexolmo_jax.storage.paths import absolute
from flexolmo_jax.storage.placing import WAYS

from .compose import Source
from .composition import Composition, Tuning
from .objects import sketches_of
from .receipt import make_receipt
from .sketch import encoded
from .store import STORE, Store, anchor_key, expert_key


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
    """Writes the merged model. `active` is the stored number of experts a token uses (default: 4,
    or all if there are fewer); `store_path` is by default `flexolmo-store` beside the model; `ways`
    are those of `compose`. Each contribution is tried (`admit`), unless `admission` is False; with
    `screening`, verdicts of the other owners, `check_screening` decides on it too.

    Raises UserError, before any expert's tensor is read, for a contribution to another anchor, one
    that is expired or not trusted, a name given twice, and `active` above E; and for tensors, the
    anchor's or a contribution's, that are not what their digests say.
    """
    check_new(out)
    anchor = open_anchor(anchor_path)
    gate = Gate(trust, admission, screening)
    contributions = [gate.open(path, anchor) for path in contribution_paths]
    store = Store.at(store_path or absolute(out).parent / STORE)
    composition = Composition.of_anchor(anchor, anchor.path / "weights", active)
    for contribution in contributions:
        composition = _with(
            composition, contribution, sketch="", source=composition.sources[0], new=True
        )
    composition.describe()  # raises before anything is read or written
    gate.check(contributions, anchor)
    with store.shared():
        held = store.anchor(anchor)
        composition = Composition.of_anchor(anchor, held.weights, active)
        for contribution in contributions:
            composition = _taken_in(composition, contribution, store, held.sketch, new=True)
        return composition.write(out, store, ways)


def opt_out(
    model_path: Path,
    names: Sequence[str],
    out: Path,
    *,
    untuned: bool = False,
    sign_key: Path | None = None,
    store_path: Path | None = None,
    ways: Sequence[str] = WAYS,
) -> Artifact:
    """Writes the model without these experts, exactly the merge that never had them, and in it the
    receipt.

    `model_path` may be a router run: the model then has its tuned rows. These bear a trace of the
    experts that were there when they were tuned; `untuned` takes the rows that were contributed
    instead, from the store. `sign_key` signs the receipt. Raises UserError for a name the model
    does not have, for the anchor's, and where an expert that stays is a copy of one that leaves.
    """
    check_new(out)
    key = load_key(sign_key) if sign_key else None
    model, tuning = _tuned(model_path)
    model.check_experts(names)
    store = _store(model, store_path)
    composition = Composition.of_model(model, tuning).without(names)
    with store.shared():
        if untuned:
            composition = composition.untuned(_contributed(composition, store))
        receipt = sealed_json(make_receipt(model, composition, names, store)).encode()
        beside = {RECEIPT: receipt} | ({RECEIPT_SIGNATURE: sign(receipt, key)} if key else {})
        return composition.write(out, store, ways, beside)


def apply_tuning(
    run: Path, out: Path, *, store_path: Path | None = None, ways: Sequence[str] = WAYS
) -> Artifact:
    """Writes the model of a router run, with the rows that it tuned. Raises UserError for another
    run."""
    check_new(out)
    model, tuning = _tuned(run)
    if not tuning.rows:
        raise UserError(f"{run} is not a router run; expected the directory of a `run: router`")
    store = _store(model, store_path)
    with store.shared():
        return Composition.of_model(model, tuning).write(out, store, ways)


def undo_tuning(
    model_path: Path, out: Path, *, store_path: Path | None = None, ways: Sequence[str] = WAYS
) -> Artifact:
    """Writes the model with the rows that were contributed, from the store: what `merge` gave.
    Raises UserError where it lacks one."""
    check_new(out)
    model, tuning = _tuned(open_model(model_path).path)
    store = _store(model, store_path)
    composition = Composition.of_model(model, tuning)
    with store.shared():
        return composition.untuned(_contributed(composition, store)).write(out, store, ways)


def replace(
    model_path: Path,
    contribution: Path,
    out: Path,
    *,
    allow_older: bool = False,
    store_path: Path | None = None,
    trust: Trust = ANY,
    admission: bool = True,
    screening: Sequence[Path] = (),
    ways: Sequence[str] = WAYS,
) -> Artifact:
    """Writes the model with a newer contribution in the place of the expert of the same name;
    `allow_older` takes any.

    Raises UserError as `merge` does.
    """
    gate = Gate(trust, admission, screening, allow_older)
    return _with_contribution(model_path, contribution, out, gate, store_path, ways, new=False)


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
    return _with_contribution(
        model_path, contribution, out, Gate(trust, admission, screening), store_path, ways, new=True
    )


def open_model(path: Path) -> Artifact:
    """Opens a merged model for use: its bytes are those of its description. Raises UserError for
    anything else."""
    artifact = open_artifact(path)
    if artifact.kind != "model":
        raise UserError(
            f"{path} is a {artifact.kind}; expected a merged model (`flexolmo merge` makes one)"
        )
    artifact.ensure()
    return artifact


@dataclass(frozen=True)
class Gate:
    """What contributions have to pass."""

    trust: Trust = ANY
    admission: bool = True  # whether each is tried, see `admit`
    screening: Sequence[Path] = ()  # verdicts of the other owners, if they are asked for
    allow_older: bool = False

    def open(self, path: Path, base: Artifact) -> Contribution:
        """One that its manifest lets in."""
        contribution = open_contribution(path)
        contribution.check(base, self.trust)
        return contribution

    def check(self, contributions: Sequence[Contribution], base: Artifact) -> None:
        """What is not in the manifests: what other owners say of an expert, and what it
        computes."""
        if self.screening:
            check_screening(contributions, self.screening, self.trust)
        if not self.admission:
            note(
                "warning: --no-admission: the sizes of the experts' weights, and whether what they"
                " compute is finite, are not looked at"
            )
            return
        for contribution in contributions:
            admit(contribution, base)


def _with_contribution(
    model_path: Path,
    path: Path,
    out: Path,
    gate: Gate,
    store_path: Path | None,
    ways: Sequence[str],
    *,
    new: bool,
) -> Artifact:
    check_new(out)
    model, tuning = _tuned(open_model(model_path).path)
    contribution = gate.open(path, model)
    composition = Composition.of_model(model, tuning)
    _with(composition, contribution, sketch="", source=composition.sources[0], new=new).describe()
    if not new and not gate.allow_older:
        check_newer(
            model.members[model.experts.index(contribution.name) - 1], contribution.manifest
        )
    gate.check([contribution], model)
    store = _store(model, store_path)
    with store.shared():
        return _taken_in(
            composition, contribution, store, _anchor_sketch(composition, model, store), new=new
        ).write(out, store, ways)


def _taken_in(
    composition: Composition,
    contribution: Contribution,
    store: Store,
    anchor: np.ndarray,
    *,
    new: bool,
) -> Composition:
    """With a contribution, out of the store; `anchor` are the sketches of the anchor's matrices."""
    held = store.expert(contribution)
    return _with(
        composition,
        contribution,
        sketch=encoded(held.sketch - anchor),
        source=Source(held.weights, 0),
        new=new,
    )


def _anchor_sketch(composition: Composition, model: Artifact, store: Store) -> np.ndarray:
    key = anchor_key(composition.anchor["tensors"])
    return (
        store.held(key, "the anchor").sketch
        if store.holds(key)
        else sketches_of(model.path / "weights", model.config)
    )


def _with(
    composition: Composition, contribution: Contribution, *, sketch: str, source: Source, new: bool
) -> Composition:
    name = contribution.name
    if new and name in composition.experts:
        raise UserError(
            f"two experts are called {name!r}; give each contribution a name of its own"
        )
    if not new and name not in composition.experts:
        raise UserError(
            f"no expert {name!r} in the model; it has {', '.join(composition.experts)}; `flexolmo"
            " append` adds one"
        )
    signature = None if contribution.signature is None else contribution.signature.decode("ascii")
    return composition.with_member(
        {"name": name, "manifest": contribution.manifest, "signature": signature, "sketch": sketch},
        source,
    )


def _tuned(path: Path) -> tuple[Artifact, Tuning]:
    """A merged model, or the model of a router run; and how it was tuned."""
    artifact = open_artifact(path)
    model = artifact.base() if artifact.description.get("run") == "router" else artifact
    model = open_model(model.path)
    traces = dict.fromkeys(model.description.get("router", {}).get("tuned_with", ()))
    if artifact.path == model.path:
        return model, Tuning(tuple(traces))
    traces |= dict.fromkeys([*model.experts, *artifact.description.get("data", ())])
    return model, Tuning(
        tuple(traces),
        {name: np.asarray(a, model.dtype) for name, a in flatten(artifact.trained()).items()},
    )


def _contributed(composition: Composition, store: Store) -> list[Source]:
    """The anchor and the members as they were taken in."""
    held = [store.held(anchor_key(composition.anchor["tensors"]), "the model's anchor")]
    for member in composition.members:
        held.append(
            store.held(expert_key(tensors_of(member)), f"the contribution of {member['name']!r}")
        )
    return [Source(each.weights, 0) for each in held]


def _store(model: Artifact, path: Path | None) -> Store:
    return Store.at(path or absolute(model.path).parent / STORE)
