"""A merged model before it is written, as a value: which anchor, which members in which order, how
many active, which router rows.

    composition.without(["law"]) == the composition that never had it
    composition.with_member(member, source).without([member.name]) == composition

Experts stand behind the anchor's along the expert axis; the trunk is the anchor's, byte for byte.
`describe` gives the description of the model, `write` the model: both depend on the value and on
nothing else.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from flexolmo_jax.artifact import DEFAULT_ACTIVE, Artifact, open_artifact, write_description
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.integrity import anchor_tensors, layouts, manifest_of, parts_of, tensor_digest
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage import verified
from flexolmo_jax.storage.files import new_directory, write_bytes
from flexolmo_jax.storage.placing import WAYS
from flexolmo_jax.storage.weights import Reader

from .compose import Source, compose
from .objects import sketch_claim
from .store import Store

Member = Mapping[str, Any]  # of a model's description: name, manifest, signature, sketch


@dataclass(frozen=True)
class Tuning:
    """What a router was tuned to, and what of: the experts that were there and the data, by name.
    Those who leave leave a trace in it."""

    traces: tuple[str, ...] = ()
    # [L, E, ...] of a router run; a tuned model has them in its weights
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Composition:
    """The value. `sources` are where the experts' weights lie, the anchor's first."""

    tokenizer: Tokenizer
    anchor: Mapping[str, Any]  # the fingerprint's parts
    fingerprint: str | None
    model: Mapping[str, Any]  # the anchor's config
    trunk: Path
    members: tuple[Member, ...]
    sources: tuple[Source, ...]
    active: int | None = None  # as it was asked for; None: DEFAULT_ACTIVE, or all
    tuning: Tuning = field(default_factory=Tuning)
    # what an imported model says of itself beside
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_anchor(cls, anchor: Artifact, weights: Path, active: int | None) -> "Composition":
        """The merge of nothing; `weights` are the anchor's in the store."""
        parts = parts_of(anchor.description)
        return cls(
            anchor.tokenizer,
            parts,
            anchor.fingerprint,
            parts["model"],
            weights,
            (),
            (Source(weights, 0),),
            active,
        )

    @classmethod
    def of_model(cls, model: Artifact, tuning: Tuning) -> "Composition":
        """A verified model as it is, its own files as sources. Raises UserError for a merge of an
        earlier version."""
        weights, description = model.path / "weights", model.description
        if description["format"] == 1 and model.fingerprint is not None:
            raise UserError(
                f"{model.path} was merged by an earlier version, which kept no proof of its anchor;"
                " merge its contributions again"
            )
        experts = len(model.experts)
        asked = (
            model.config.n_active if model.config.n_active != min(experts, DEFAULT_ACTIVE) else None
        )
        if "anchor" not in description:
            raise UserError(
                f"{model.path} was assembled of dense models; expected one that `flexolmo merge` or"
                " `import-hf` made"
            )
        parts = (
            {"tensors": anchor_tensors(description)}
            if description["format"] == 1
            else parts_of(description)
        )
        more = {key: description[key] for key in ("imported",) if key in description}
        sources = tuple(Source(weights, i) for i in range(experts))
        config = parts.get("model") or description["model"]
        return cls(
            model.tokenizer,
            parts,
            model.fingerprint,
            config,
            weights,
            model.members,
            sources,
            asked,
            tuning,
            more,
        )

    @property
    def experts(self) -> tuple[str, ...]:
        """Names; "anchor" first."""
        return ("anchor", *(member["name"] for member in self.members))

    def without(self, names: Sequence[str]) -> "Composition":
        """Without these experts. It keeps the number of active ones that it was given, as far as
        there are so many."""
        kept = [i for i, name in enumerate(self.experts) if name not in names]
        tuning = dataclasses.replace(
            self.tuning, rows={path: rows[:, kept] for path, rows in self.tuning.rows.items()}
        )
        members, sources = (
            tuple(self.members[i - 1] for i in kept[1:]),
            tuple(self.sources[i] for i in kept),
        )
        active = self.active and min(self.active, len(kept))
        return dataclasses.replace(
            self, members=members, sources=sources, tuning=tuning, active=active
        )

    def with_member(self, member: Member, source: Source) -> "Composition":
        """With this expert: in the place of the one of its name, or as the last."""
        members, sources = list(self.members), list(self.sources)
        place = (
            self.experts.index(member["name"]) if member["name"] in self.experts else len(sources)
        )
        members[place - 1 : place], sources[place : place + 1] = [member], [source]
        return dataclasses.replace(self, members=tuple(members), sources=tuple(sources))

    def untuned(self, contributed: Sequence[Source]) -> "Composition":
        """With the router rows that were contributed: the anchor and the members as they lie in the
        store."""
        return dataclasses.replace(self, sources=tuple(contributed), tuning=Tuning())

    def describe(self) -> dict[str, Any]:
        """The description of the model. Raises UserError for a name given twice, and for more
        active experts than there are."""
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
            "tokenizer": self.tokenizer.digest,
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
        """A tuned router's rows and biases, [L, E, ...]; of an expert that came later, as they were
        contributed."""
        paths = (
            [path for path in ("experts/row", "experts/bias") if path in tensors]
            if self.tuning.traces
            else []
        )
        if self.tuning.rows:
            return {path: self.tuning.rows[path] for path in paths}
        return {
            path: np.stack(
                [_rows_of(path, source, tensors[path]) for source in self.sources], axis=1
            )
            for path in paths
        }

    def write(
        self,
        out: Path,
        store: Store,
        ways: Sequence[str] = WAYS,
        beside: Mapping[str, bytes] = MappingProxyType({}),
    ) -> Artifact:
        """Writes the model, with these files `beside` it, and says to the store where it is."""
        description = self.describe()
        store.register(out)  # first: what a killed process leaves beside it can then be found
        with new_directory(out) as directory:
            self.tokenizer.save(directory / "tokenizer.json")
            target = layouts(ModelConfig(**description["model"]), description["tensors"])
            taken = compose(
                directory / "weights",
                target,
                self.trunk,
                self.sources,
                ways,
                self.rows(description["tensors"]),
            )
            for name, content in beside.items():
                write_bytes(directory / name, content)
            write_description(directory, description)
        note(f"composed {out}: {', '.join(f'{n} files by {way}' for way, n in taken.items())}")
        model = open_artifact(out)
        model.remember()
        verified.remember(model.path, sketch_claim(model))
        return model


def _rows_of(path: str, source: Source, entry: Mapping[str, Any]) -> np.ndarray:
    """An expert's rows or biases, of all layers."""
    reader = Reader(source.weights)
    if not reader.has(path):
        return np.zeros([n for axis, n in enumerate(entry["shape"]) if axis != 1], entry["dtype"])
    return reader.read(path, (slice(None), slice(source.index, source.index + 1)))[:, 0]
