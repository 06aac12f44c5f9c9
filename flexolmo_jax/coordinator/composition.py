"""A merged model before it is written, as a value.

The value says which anchor, which members in which order, how many experts a token uses, and which
router rows.

    composition.without(["law"]) == the composition that never had it
    composition.with_member(member, expert).without([member.name]) == composition

On the expert axis the anchor's FFN comes first, then the members. The trunk is the anchor's, byte
for byte. `describe` gives the model's description and `write` the model. Both depend on the value
and on nothing else.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from flexolmo_jax.artifact import DEFAULT_ACTIVE, Artifact, open_artifact, write_description
from flexolmo_jax.config import ModelConfig, build
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.integrity import anchor_tensors, layouts, manifest_of, parts_of, tensor_digest
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage import verified
from flexolmo_jax.storage.files import new_directory, write_bytes
from flexolmo_jax.storage.paths import in_bucket
from flexolmo_jax.storage.placing import WAYS
from flexolmo_jax.storage.weights import Reader

from .materialize import StoredExpert, materialize
from .objects import sketch_claim
from .store import Store

Member = Mapping[str, Any]  # of a model's description: name, manifest, signature, sketch


@dataclass(frozen=True)
class Tuning:
    """How a router was tuned: what left a trace in its rows, and the rows."""

    # names of the experts that were there and of the data: a trace stays when an expert leaves
    traces: tuple[str, ...] = ()
    # [L, E, ...] by path, of a router run; a tuned model has them in its weights
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Composition:
    """Anchor, members, active experts and router rows of a model to write."""

    tokenizer: Tokenizer | None  # None: of an imported model that has none
    anchor: Mapping[str, Any]  # what the fingerprint is taken of
    fingerprint: str | None  # None: of an imported model
    model: Mapping[str, Any]  # the anchor's config
    trunk: Path  # the weights with the trunk
    members: tuple[Member, ...]
    stored: tuple[StoredExpert, ...]  # each expert's weights, the anchor's first
    active: int | None = None  # as it was asked for; None: DEFAULT_ACTIVE, or all
    tuning: Tuning = field(default_factory=Tuning)
    # the model whose files are taken, as long as they are its own; None: all are a store's
    given: Artifact | None = field(default=None, compare=False)
    # keys that not every description has: `imported`, and how long the records of training were
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_anchor(cls, anchor: Artifact, weights: Path, active: int | None) -> "Composition":
        """The anchor without members; `weights` is its directory in the store."""
        parts = parts_of(anchor.description)
        return cls(
            tokenizer=anchor.tokenizer,
            anchor=parts,
            fingerprint=anchor.fingerprint,
            model=parts["model"],
            trunk=weights,
            members=(),
            stored=(StoredExpert(weights, 0),),
            active=active,
            more=_kept(anchor.description),
        )

    @classmethod
    def of_model(cls, model: Artifact, tuning: Tuning) -> "Composition":
        """A verified model as it is, from its own files.

        Raises UserError for one assembled of dense models, and for a merge of an earlier version.
        """
        weights, description = model.path / "weights", model.description
        is_format_1 = description["format"] == 1
        if is_format_1 and model.fingerprint is not None:
            raise UserError(
                f"{model.path} was merged by an earlier version, which kept no proof of its anchor;"
                " merge its contributions again"
            )
        if "anchor" not in description:
            raise UserError(
                f"{model.path} was assembled of dense models; expected one that `flexolmo merge` or"
                " `import-hf` made"
            )
        experts, active = len(model.experts), model.config.n_active
        is_default = active == min(experts, DEFAULT_ACTIVE)
        parts = {"tensors": anchor_tensors(description)} if is_format_1 else parts_of(description)
        return cls(
            tokenizer=model.own_tokenizer,
            anchor=parts,
            fingerprint=model.fingerprint,
            model=parts.get("model") or description["model"],
            trunk=weights,
            members=model.members,
            stored=tuple(StoredExpert(weights, i) for i in range(experts)),
            active=None if is_default else active,
            tuning=tuning,
            given=model,
            more=_kept(description),
        )

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts' names, "anchor" first."""
        return ("anchor", *(member["name"] for member in self.members))

    def without(self, names: Sequence[str]) -> "Composition":
        """The composition without these experts, with at most as many active as before."""
        kept = [i for i, name in enumerate(self.experts) if name not in names]
        rows = {path: rows[:, kept] for path, rows in self.tuning.rows.items()}
        return dataclasses.replace(
            self,
            members=tuple(self.members[i - 1] for i in kept[1:]),
            stored=tuple(self.stored[i] for i in kept),
            tuning=dataclasses.replace(self.tuning, rows=rows),
            active=self.active and min(self.active, len(kept)),
        )

    def with_member(self, member: Member, expert: StoredExpert) -> "Composition":
        """The composition with this expert, in place of the one of its name or as the last."""
        members, stored, names = list(self.members), list(self.stored), self.experts
        at = names.index(member["name"]) if member["name"] in names else len(names)
        stored[at : at + 1] = [expert]
        members[at - 1 : at] = [member]  # expert 0 is the anchor's, which is no member
        return dataclasses.replace(self, members=tuple(members), stored=tuple(stored))

    def untuned(self, contributed: Sequence[StoredExpert]) -> "Composition":
        """The composition with the contributed router rows: all experts from the store."""
        return dataclasses.replace(self, stored=tuple(contributed), tuning=Tuning())

    def describe(self) -> dict[str, Any]:
        """The model's description, without its digest.

        Raises UserError for a name given twice, and for more active experts than there are.
        """
        names = self.experts
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(
                f"two experts are called {twice[0]!r}; give each contribution a name of its own"
            )
        if self.active is not None and not 1 <= self.active <= len(names):
            raise UserError(
                f"--active is {self.active}; expected 1 to {len(names)}, the number of experts"
                f" ({', '.join(names)})"
            )
        has_bias = any((manifest_of(member) or member)["router_bias"] for member in self.members)
        sizes = {
            "n_experts": len(names),
            "n_active": self.active or min(len(names), DEFAULT_ACTIVE),
            "router_bias": has_bias,
        }
        tensors = {}
        for path, entry in self.anchor["tensors"].items():
            shape = list(entry["shape"])
            if path.startswith("experts/"):
                shape[1] = len(names)
            tensors[path] = {"dtype": entry["dtype"], "shape": shape}
        if has_bias:
            row = tensors["experts/row"]
            tensors["experts/bias"] = {"dtype": row["dtype"], "shape": row["shape"][:2]}
        description = {
            "kind": "model",
            "model": dict(self.model) | sizes,
            "experts": list(names),
            "members": list(self.members),
            "anchor": dict(self.anchor),
            "fingerprint": self.fingerprint,
            **(self.tokenizer.digests if self.tokenizer else {}),
            "tensors": tensors,
            **self.more,
        }
        return description | self._tuned(tensors)

    def _tuned(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        if not self.tuning.traces:
            return {}
        digests = {path: tensor_digest(rows) for path, rows in self.rows(tensors).items()}
        return {"router": {"tuned_with": list(self.tuning.traces), "tensors": digests}}

    def rows(self, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """A tuned router's rows and biases, [L, E, ...]; none of a router that is not tuned.

        Those of an expert that came after the tuning are the contributed ones.
        """
        if not self.tuning.traces:
            return {}
        paths = [path for path in ("experts/row", "experts/bias") if path in tensors]
        if self.tuning.rows:
            return {path: self.tuning.rows[path] for path in paths}
        found = {}
        for path in paths:
            of_experts = [_rows_of(path, expert, tensors[path]) for expert in self.stored]
            found[path] = np.stack(of_experts, axis=1)
        return found

    def write(
        self,
        out: Path,
        store: Store,
        ways: Sequence[str] = WAYS,
        beside: Mapping[str, bytes] = MappingProxyType({}),
    ) -> Artifact:
        """Writes the model, with the files `beside` its own, and registers it with the store."""
        description = self.describe()
        store.register(out)  # first, so that `gc` finds what a killed process left beside it
        origins = {self.trunk, *(expert.weights for expert in self.stored)}
        with new_directory(out) as directory, verified.unchanged(origins):
            if self.given:
                self.given.ensure()
            store.check_again(origins)
            if self.tokenizer:
                self.tokenizer.save(directory)
            tensors = description["tensors"]
            target, rows = (
                layouts(build(ModelConfig, description["model"]), tensors),
                self.rows(tensors),
            )
            weights = directory / "weights"
            taken = materialize(weights, target, self.trunk, self.stored, ways, rows)
            for name, content in beside.items():
                write_bytes(directory / name, content)
            write_description(directory, description)
            if not in_bucket(out):  # here, as others may put something else in its place
                _remember(open_artifact(directory))
        note(f"composed {out}: {', '.join(f'{n} files by {way}' for way, n in taken.items())}")
        model = open_artifact(out)
        if in_bucket(out):  # where the mark of an unfinished directory was one of its files
            _remember(model)
        return model


def _kept(description: Mapping[str, Any]) -> dict[str, Any]:
    return {key: description[key] for key in ("imported", "seq_len") if key in description}


def _remember(model: Artifact) -> None:
    model.remember()
    verified.remember(model.path, sketch_claim(model))


def _rows_of(path: str, expert: StoredExpert, entry: Mapping[str, Any]) -> np.ndarray:
    """An expert's rows or biases in all layers; biases are 0 where it has none."""
    reader = Reader(expert.weights)
    if not reader.has(path):
        layers, _, *rest = entry["shape"]
        return np.zeros((layers, *rest), entry["dtype"])
    return reader.read(path, (slice(None), slice(expert.index, expert.index + 1)))[:, 0]
