"""What a path holds: a training run, a published anchor or a merged model; opened and loaded the same way.

Each has a `flexolmo.json` that says what it is, its weights as an Orbax checkpoint, and the tokenizer:

    RUN      config.yaml  checkpoints/<step>/  metrics.jsonl
    ANCHOR   weights/     embedder/            public/ (packed public records for owners)
    MODEL    weights/

A pair's run holds its expert only and names its anchor by path and fingerprint; a router run holds rows and biases.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flexolmo_jax.config import ModelConfig, build
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.tree import flatten, unflatten
from flexolmo_jax.storage import checkpoint
from flexolmo_jax.storage.files import write_text
from flexolmo_jax.storage.paths import path_of
from flexolmo_jax.storage.untrusted import parse_json
from flexolmo_jax.storage.weights import Reader, Stored, missing_shards

DESCRIPTION = "flexolmo.json"
FORMAT = 1
DEFAULT_ACTIVE = 4  # experts that a token of a merged model uses, where nobody says how many

Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]  # where a tensor of this path and shape goes


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
        """Of the published anchor that this is or stands on; None for an anchor's run and a joint model."""
        return self.description.get("fingerprint")

    @property
    def dtype(self) -> str:
        """Of the weights of a published anchor and of a merged model."""
        return self.description["tensors"]["trunk/embedding"]["dtype"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path)

    def params(self, which: str = "last", placement: Placement | None = None) -> dict[str, Any]:
        """The whole parameter tree (a pair's with its anchor's), on one device unless a placement is given.

        `which` chooses a run's checkpoint: last, best or a step.
        """
        placement = placement or _on_one_device
        if self.kind == "run":
            own = self.trained(which, placement)
            return unflatten(flatten(self.base().params(placement=placement)) | flatten(own)) if "base" in self.description else own
        self._check_whole()
        return checkpoint.load_weights(self.path / "weights", self._stored(placement))

    def trained(self, which: str = "last", placement: Placement | None = None) -> dict[str, Any]:
        """What a run trained: of a pair the expert, of a router run rows and biases, of others everything."""
        target = self._stored(placement or _on_one_device)
        with checkpoint.StepCheckpoints(self.path / "checkpoints") as checkpoints:
            return checkpoints.restore_part("params", target, self.step(which))

    def arrays(self, which: str = "last") -> dict[str, Any]:
        """Each parameter by path: of an anchor or a model as `Stored`, read when it is asked for; of a run in memory.

        Raises UserError where files are missing.
        """
        if self.kind == "run":
            return flatten(self.params(which))
        self._check_whole()
        reader, tensors = Reader(self.path / "weights"), self.description["tensors"]
        return {path: Stored(reader, path, tuple(t["shape"]), jnp.dtype(t["dtype"])) for path, t in tensors.items()}

    def step(self, which: str = "last") -> int:
        """The step of a run's checkpoint: last, best, or the step itself. Raises UserError where there is no such one."""
        with checkpoint.StepCheckpoints(self.path / "checkpoints") as checkpoints:
            return checkpoints.choose(which)

    def base(self) -> "Artifact":
        """The anchor of a pair's run, the model of a router run; refused if it is no longer the one trained against."""
        base = open_artifact(path_of(self.description["base"]))
        # A merged model has its anchor's fingerprint: what makes it this one are its experts.
        if base.fingerprint != self.fingerprint or (base.kind == "model" and base.experts != self.experts):
            raise UserError(f"{self.path} was trained on another version of {base.path} (fingerprint {self.fingerprint}); restore that one")
        return base

    def check_experts(self, names: Sequence[str]) -> None:
        """Raises UserError unless each of these experts is there and none of them is the anchor's."""
        for name in names:
            if name not in self.experts:
                raise UserError(f"no expert {name!r} in {self.path}; it has {', '.join(self.experts)}")
            if name == "anchor":
                raise UserError("the anchor cannot be excluded: every expert was trained beside it; exclude other experts")

    def _check_whole(self) -> None:
        if missing := missing_shards(self.path / "weights", self.description["tensors"]):
            raise UserError(f"{self.path} is not whole: {missing[0]} is not there ({len(missing)} files are missing); fetch it again")

    def _stored(self, placement: Placement) -> dict[str, Any]:
        target = {}
        for path, tensor in self.description["tensors"].items():
            shape = tuple(tensor["shape"])
            target[path] = jax.ShapeDtypeStruct(shape, jnp.dtype(tensor["dtype"]), sharding=placement(path, shape))
        return unflatten(target)


def _on_one_device(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def open_artifact(path: str | Path) -> Artifact:
    """Raises UserError where the path holds none, or one of a newer format."""
    path = path_of(path)
    try:
        description = read_sealed(path / DESCRIPTION)
        if description["format"] > FORMAT:
            raise UserError(f"{path} has format {description['format']}; this version reads up to {FORMAT}; upgrade flexolmo-jax")
        config = build(ModelConfig, description["model"])
        return Artifact(path, description["kind"], config, tuple(description["experts"]), description)
    except FileNotFoundError:
        raise UserError(f"{path} is not a run, anchor or model: it has no {DESCRIPTION}") from None
    except NotADirectoryError:
        raise UserError(f"{path} is a file; expected the directory of a run, anchor or model") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path / DESCRIPTION} is damaged ({type(error).__name__}: {error}); restore it or make the artifact anew"
        ) from None


def active_among(config: ModelConfig, experts: int) -> int:
    """How many a token uses when a model gets or loses experts: a number that was given stays, one that was not goes with them."""
    given = config.n_active != min(config.n_experts, DEFAULT_ACTIVE)
    return min(config.n_active if given else DEFAULT_ACTIVE, experts)


def describe(params: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The `tensors` entry of a description: shape and dtype of each, by path."""
    return {path: {"dtype": str(a.dtype), "shape": list(a.shape)} for path, a in flatten(params).items()}


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value that digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def write_description(directory: Path, description: dict[str, Any]) -> None:
    """Writes `flexolmo.json`, with the digest of everything else in it."""
    write_text(directory / DESCRIPTION, sealed_json({"format": FORMAT, **description}))


def sealed_json(description: Mapping[str, Any]) -> str:
    """A JSON object, readable, with the digest of everything else in it."""
    rest = {key: value for key, value in description.items() if key != "sha256"}
    rest["sha256"] = hashlib.sha256(canonical_json(rest).encode()).hexdigest()
    return json.dumps(rest, indent=1, sort_keys=True) + "\n"


def read_sealed(path: Path) -> dict[str, Any]:
    """What `sealed_json` wrote. Raises OSError, ValueError, TypeError or AttributeError."""
    text = path.read_text("utf-8")
    description = parse_json(text)
    if text != sealed_json(description):
        raise ValueError("its bytes are not those that its own digest was taken of")
    return description
