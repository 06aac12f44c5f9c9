"""What a path holds: a training run, a published anchor or a merged model; opened and loaded the
same way.

Each has a `flexolmo.json` that says what it is, its weights as an Orbax checkpoint, and the
tokenizer:

    RUN      config.yaml  checkpoints/<step>/  metrics.jsonl
    ANCHOR   weights/     embedder/            public/ (packed public records for owners)
    MODEL    weights/

A pair's run holds its expert only and names its anchor by path and fingerprint; a router run holds
rows and biases.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flexolmo_jax import integrity
from flexolmo_jax.config import ModelConfig, to_dict
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.description import (
    DESCRIPTION,
    read_description,
    read_sealed,
    sealed_json,
    write_description,
)
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.tree import flatten, unflatten
from flexolmo_jax.runtime.processes import by_the_first
from flexolmo_jax.storage import checkpoint, loading, verified
from flexolmo_jax.storage.paths import path_of
from flexolmo_jax.storage.weights import Reader, Stored

__all__ = [
    "DESCRIPTION",
    "Artifact",
    "Placement",
    "describe",
    "open_artifact",
    "read_sealed",
    "sealed_json",
    "write_description",
]

DEFAULT_ACTIVE = 4  # experts that a token of a merged model uses, where nobody says how many
OF_PAIRS = ("router_bias", "init_bias")  # keys of a pair's model that are not its anchor's
# where a tensor of this path and shape goes
Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


@dataclass(frozen=True)
class Artifact:
    """An opened run, anchor or model. Opening reads JSON only; `params` reads the weights."""

    path: Path
    kind: str  # run | anchor | model
    config: ModelConfig
    experts: tuple[str, ...]  # "anchor" first
    description: dict[str, Any]  # all of flexolmo.json

    @property
    def is_pair(self) -> bool:
        return self.description.get("run") == "pair"

    @property
    def fingerprint(self) -> str | None:
        """Of the published anchor that this is or stands on; None for an anchor's run and a joint
        model."""
        return self.description.get("fingerprint")

    @property
    def dtype(self) -> str:
        """Of the weights of a published anchor and of a merged model."""
        return next(iter(self.description["tensors"].values()))["dtype"]

    @property
    def members(self) -> tuple[dict[str, Any], ...]:
        """What a model keeps of the contributions that it was merged from, in the order of its
        experts."""
        return tuple(self.description.get("members", ()))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path)

    def params(self, which: str = "last", placement: Placement | None = None) -> dict[str, Any]:
        """The whole parameter tree (a pair's with its anchor's), on one device unless a placement
        is given.

        `which` chooses a run's checkpoint: last, best or a step.
        """
        placement = placement or _on_one_device
        if self.kind == "run":
            own = self.trained(which, placement)
            return (
                unflatten(flatten(self.base().params(placement=placement)) | flatten(own))
                if "base" in self.description
                else own
            )
        self.ensure()
        return loading.load(Reader(self.path / "weights"), self._stored(placement))

    def trained(self, which: str = "last", placement: Placement | None = None) -> dict[str, Any]:
        """What a run trained: of a pair the expert, of a router run rows and biases, of others
        everything."""
        target = self._stored(placement or _on_one_device)
        with checkpoint.StepCheckpoints(self.path / "checkpoints") as checkpoints:
            return checkpoints.restore_part("params", target, self.step(which))

    def arrays(self, which: str = "last") -> dict[str, Any]:
        """Each parameter by path: of an anchor or a model as `Stored`, read when it is asked for;
        of a run in memory.

        Raises UserError as `ensure` does.
        """
        if self.kind == "run":
            return flatten(self.params(which))
        self.ensure()
        reader, tensors = Reader(self.path / "weights"), self.description["tensors"]
        return {
            path: Stored(reader, path, tuple(t["shape"]), jnp.dtype(t["dtype"]))
            for path, t in tensors.items()
        }

    def step(self, which: str = "last") -> int:
        """The step of a run's checkpoint: last, best, or the step itself. Raises UserError where
        there is no such one."""
        with checkpoint.StepCheckpoints(self.path / "checkpoints") as checkpoints:
            return checkpoints.choose(which)

    def base(self) -> "Artifact":
        """The anchor of a pair's run, the model of a router run; refused if it is no longer the one
        trained against."""
        base = open_artifact(path_of(self.description["base"]))
        expected = "anchor" if self.is_pair else "model"
        if base.kind != expected:
            raise UserError(
                f"{self.path} was trained on {base.path}, which is a {base.kind} now; expected"
                f" its {expected}; restore that one"
            )
        # A merged model has its anchor's fingerprint: what makes it this one are its experts, and
        # which contributions they are.
        is_it = base.fingerprint == self.fingerprint and (
            base.kind != "model" or base.experts == self.experts
        )
        if not is_it or self.description.get("base_sha256") not in (
            None,
            base.description["sha256"],
        ):
            raise UserError(
                f"{self.path} was trained on another version of {base.path} (fingerprint"
                f" {self.fingerprint}); restore that one"
            )
        ours, its, own = to_dict(self.config), to_dict(base.config), OF_PAIRS * self.is_pair
        if changed := [key for key in ours if ours[key] != its[key] and key not in own]:
            raise UserError(
                f"{self.path} has another model.{changed[0]} than {base.path}, on which it was"
                " trained; do not use it"
            )
        return base

    def ensure(self) -> None:
        """Makes sure that an anchor's or a model's bytes are those of its description and its
        fingerprint.

        They are read once, and again when a file was changed; of several processes the first does
        it for all. Raises UserError.
        """

        def check() -> None:
            integrity.check(self.path, self.description, self.config)

        if self.kind != "run":
            by_the_first(lambda: verified.once(self.path, self._claim, check))

    def remember(self) -> None:
        """Says that this process has just written all of it, of verified bytes."""
        verified.remember(self.path, self._claim)

    @property
    def _claim(self) -> str:
        return f"{self.kind} {self.description['sha256']}"

    def check_experts(self, names: Sequence[str]) -> None:
        """Raises UserError unless each of these experts is there and none of them is the
        anchor's."""
        for name in names:
            if name not in self.experts:
                raise UserError(
                    f"no expert {name!r} in {self.path}; it has {', '.join(self.experts)}"
                )
            if name == "anchor":
                raise UserError(
                    "the anchor cannot be excluded: every expert was trained beside it; exclude"
                    " other experts"
                )

    def _stored(self, placement: Placement) -> dict[str, Any]:
        target = {}
        for path, tensor in self.description["tensors"].items():
            shape = tuple(tensor["shape"])
            target[path] = jax.ShapeDtypeStruct(
                shape, jnp.dtype(tensor["dtype"]), sharding=placement(path, shape)
            )
        return unflatten(target)


def _on_one_device(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def open_artifact(path: str | Path) -> Artifact:
    """Raises UserError where the path holds none, one that contradicts itself, or one of a newer
    format."""
    path = path_of(path)
    description, config = read_description(path)
    if description["kind"] == "run":
        integrity.check_run(path, description, config)
    return Artifact(path, description["kind"], config, tuple(description["experts"]), description)


def active_among(config: ModelConfig, experts: int) -> int:
    """How many a token uses when a model gets or loses experts: a number that was given stays, one
    that was not goes with them."""
    given = config.n_active != min(config.n_experts, DEFAULT_ACTIVE)
    return min(config.n_active if given else DEFAULT_ACTIVE, experts)


def describe(params: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The `tensors` entry of a description: shape and dtype of each, by path."""
    return {
        path: {"dtype": str(a.dtype), "shape": list(a.shape)} for path, a in flatten(params).items()
    }
