"""A training run, a published anchor or a merged model, opened and loaded the same way.

Each is a directory with a description (`flexolmo.json`), the tokenizer, a chat template if there is
one (`chat.json`), what else its publisher says of it (`conventions.json`), and its weights as an
Orbax checkpoint:

    RUN      config.yaml  checkpoints/<step>/  metrics.jsonl
    ANCHOR   weights/     embedder/            public/ (packed public records for owners)
    MODEL    weights/

The run of a pair stores the new expert only, and that of a router the router rows and biases. Both
name what they were trained on by its path and its anchor's fingerprint.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flexolmo_jax import integrity
from flexolmo_jax.config import ModelConfig, read_config, to_dict
from flexolmo_jax.data.ids import warn_of_length
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.description import (
    DESCRIPTION,
    read_description,
    read_sealed,
    sealed_json,
    write_description,
)
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import logical_axes
from flexolmo_jax.model.tree import flatten, unflatten
from flexolmo_jax.runtime.devices import all_devices
from flexolmo_jax.runtime.processes import by_the_first
from flexolmo_jax.runtime.sharding import parameter_sharding
from flexolmo_jax.storage import checkpoint, loading, verified
from flexolmo_jax.storage.averages import MeanReader, restore_mean
from flexolmo_jax.storage.paths import BUCKETS, absolute, bucket_of, in_bucket, is_there, path_of
from flexolmo_jax.storage.weights import Reader, Stored

__all__ = [
    "DESCRIPTION",
    "Artifact",
    "Placement",
    "Which",
    "describe",
    "open_artifact",
    "placement_on",
    "read_sealed",
    "sealed_json",
    "write_description",
]

LEVELS = 6  # of folders, that a run and what it read may have had in common and not in common
DEFAULT_ACTIVE = 4  # experts that a token of a merged model uses, unless a number is given
OF_PAIRS = ("router_bias", "init_bias")  # keys of a pair's model that are not its anchor's
Which = str | tuple[int, ...]  # a run's checkpoint: last, best or a step; or steps, for their mean
# from a tensor's path and shape to where it goes
Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


@dataclass(frozen=True)
class Artifact:
    """An opened run, anchor or model. Opening it reads JSON only; `params` reads the weights."""

    path: Path
    kind: str  # run | anchor | model
    config: ModelConfig
    experts: tuple[str, ...]  # "anchor" first
    description: dict[str, Any]  # all of flexolmo.json
    base_at: Path | None = None  # where the base of a run lies, if the user says so

    @property
    def is_pair(self) -> bool:
        return self.description.get("run") == "pair"

    @property
    def fingerprint(self) -> str | None:
        """That of the anchor this is or stands on; None for an anchor's run and a joint model."""
        return self.description.get("fingerprint")

    @property
    def dtype(self) -> str:
        """The dtype of an anchor's or a model's weights."""
        return next(iter(self.description["tensors"].values()))["dtype"]

    @property
    def members(self) -> tuple[dict[str, Any], ...]:
        """What a model keeps of each contribution in it, in the order of its experts."""
        return tuple(self.description.get("members", ()))

    @cached_property
    def trained_seq_len(self) -> int | None:
        """Tokens of the records that it was trained on; None where nothing says so, as of imported
        models and of anchors of earlier versions."""
        if self.kind != "run":
            return self.description.get("seq_len")
        file = self.path / "config.yaml"
        return read_config(file).data.seq_len if file.exists() else None

    def warn_of_length(self, length: int, what: str) -> None:
        """Says once that `what`, of so many tokens, is longer than what it was trained on, or
        reads."""
        most, trained = self.config.max_seq_len, self.trained_seq_len
        if length > most or trained is None:
            warn_of_length(length, most, what)
        else:
            warn_of_length(length, trained, what, "of the records that the model was trained on")

    @property
    def own_tokenizer(self) -> Tokenizer | None:
        """None of a model that was imported without one."""
        has_one = self.kind == "run" or "tokenizer" in self.description
        return self.tokenizer if has_one else None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """With chat template and conventions. Raises UserError where there is none, for others than
        those of the description, and for too large a tokenizer."""
        if self.kind != "run" and "tokenizer" not in self.description:
            raise UserError(
                f"{self.path} has no tokenizer: it was imported without one; import it again with"
                " `import-hf --tokenizer PATH`, a tokenizer.json or a folder that holds it"
            )
        tokenizer = Tokenizer.load(self.path)
        if self.kind != "run":  # whose description names none
            integrity.check_tokenizer(self.path, tokenizer, self.description)
        if tokenizer.vocab_size > self.config.vocab_size:  # ids beyond it would be read as others
            raise UserError(
                f"{self.path}: its tokenizer has {tokenizer.vocab_size} tokens; expected at most"
                f" {self.config.vocab_size}, as its model has; do not use it"
            )
        return tokenizer

    def params(self, which: str = "last", placement: Placement | None = None) -> dict[str, Any]:
        """The whole parameter tree. That of a pair includes the anchor.

        Args:
            which: a run's checkpoint: last, best or a step.
            placement: where each tensor goes; without it, all go to one device.
        """
        placement = placement or placement_on(None, self.config)
        if self.kind == "run":
            own = self.trained(which, placement)
            if "base" not in self.description:
                return own
            return unflatten(flatten(self.base().params(placement=placement)) | flatten(own))
        self._check_only(which)
        self.ensure()
        params = loading.load(Reader(self.path / "weights"), self._stored(placement))
        self.ensure()  # again: another directory may have got this name meanwhile
        return params

    def trained(self, which: str = "last", placement: Placement | None = None) -> dict[str, Any]:
        """What a run trained: a pair's new expert, router rows and biases, or all parameters."""
        target = self._stored(placement or placement_on(None, self.config))
        with checkpoint.StepCheckpoints(self.path / "checkpoints") as checkpoints:
            return restore_mean(checkpoints, "params", target, self.steps(which))

    def arrays(self, which: Which = "last") -> dict[str, Stored]:
        """Each parameter by its path, with those of the base of a run. Raises UserError as `ensure`
        and `params` do.

        They are read when they are indexed: a part of an anchor's or a model's, the whole of a
        run's, of which the last one stays in memory.
        """
        tensors = flatten(self._stored(placement_on(None, self.config)))
        inherited: dict[str, Stored] = {}
        if self.kind == "run":
            with checkpoint.StepCheckpoints(self.path / "checkpoints") as checkpoints:
                reader = MeanReader(checkpoints, "params", tensors, self.steps(which))
            inherited = self.base().arrays() if "base" in self.description else {}
        else:
            self._check_only(which)
            self.ensure()
            reader = Reader(self.path / "weights")
        return inherited | {
            path: Stored(reader, path, t.shape, t.dtype) for path, t in tensors.items()
        }

    def _check_only(self, which: Which) -> None:
        if which != "last":
            raise UserError(
                f"{self.path} is not a run and has no checkpoint {which!r:.40}; leave out"
                " --checkpoint"
            )

    def step(self, which: str = "last") -> int:
        """The step of a run's last or best checkpoint, or of the step given.

        Raises UserError if there is no such checkpoint.
        """
        return self.steps(which)[-1]

    def steps(self, which: Which = "last") -> tuple[int, ...]:
        """The steps whose mean a run's checkpoint is, the oldest first: one, but for the last where
        the run has `train.average`, or fewer checkpoints than that. Raises UserError as `step`."""
        if not isinstance(which, str):
            return which
        with checkpoint.StepCheckpoints(self.path / "checkpoints") as checkpoints:
            chosen = checkpoints.choose(which)
            if which != "last":
                return (chosen,)
            return tuple(checkpoints.steps()[: self.description.get("average", 1)][::-1])

    def base(self) -> "Artifact":
        """What a run was trained on: a pair's anchor, or the model whose router was tuned.

        It lies where the user says. Otherwise it is where it was, or beside the run if both were
        moved or copied. Raises UserError if it is not there, or is another one.
        """
        recorded = self.description["base"]
        places = [self.base_at] if self.base_at else places_of(self.path, recorded)
        refusals: list[UserError] = []
        for place in places:
            try:
                return self._base_at(place)
            except UserError as error:
                refusals.append(error)
        raise refusals[0]

    def _base_at(self, place: str | Path) -> "Artifact":
        expected = "anchor" if self.is_pair else "model"
        if not is_there(path_of(place) / DESCRIPTION):
            raise UserError(
                f"{self.path} was trained on the {expected} {self.fingerprint}, which is not at"
                f" {place}; give the place where it is (--anchor)"
            )
        base = open_artifact(place)
        if base.kind != expected:
            raise UserError(
                f"{self.path} was trained on {base.path}, which is a {base.kind} now; expected"
                f" its {expected}; restore that one"
            )
        # All models of one anchor share its fingerprint. They differ in their experts, and in the
        # contributions that these came from, which the description's digest covers.
        has_our_experts = base.kind != "model" or base.experts == self.experts
        digest = self.description.get("base_sha256")
        is_described = digest is None or digest == base.description["sha256"]
        if base.fingerprint != self.fingerprint or not has_our_experts or not is_described:
            raise UserError(
                f"{self.path} was trained on another version of {base.path} (fingerprint"
                f" {self.fingerprint}; this is {base.fingerprint}); restore that one, or give the"
                " place where it is (--anchor)"
            )
        ours, its = to_dict(self.config), to_dict(base.config)
        own = OF_PAIRS if self.is_pair else ()
        if changed := [key for key in ours if ours[key] != its[key] and key not in own]:
            raise UserError(
                f"{self.path} has another model.{changed[0]} than {base.path}, on which it was"
                " trained; do not use it"
            )
        return base

    def ensure(self) -> None:
        """Raises UserError unless an anchor's or a model's bytes match its description.

        The bytes are read once, and again after a file has changed. Of several processes, the first
        reads for all.
        """

        def check() -> None:
            integrity.check(self.path, self.description, self.config)

        if self.kind != "run":
            by_the_first(lambda: verified.once(self.path, self._claim, check))

    def remember(self) -> None:
        """Counts all files as verified: this process has just written them from verified bytes."""
        verified.remember(self.path, self._claim)

    @property
    def _claim(self) -> str:
        return f"{self.kind} {self.description['sha256']}"

    def check_experts(self, names: Sequence[str]) -> None:
        """Raises UserError for an expert that does not exist, and for the anchor."""
        if isinstance(names, str):  # its letters would be names
            raise UserError(f"experts are {names!r:.80}; expected a list of names, also of one")
        for name in names:
            if name not in self.experts:
                known = ", ".join(self.experts)
                raise UserError(f"no expert {name!r} in {self.path}; it has {known}")
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


def placement_on(mesh: Mesh | None, config: ModelConfig, *, pair: bool = False) -> Placement:
    """Where the parameters of a model, or of a pair, go: over a mesh by their logical axes; without
    one to one device."""
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(all_devices()[0])
        return lambda path, shape: one
    axes = flatten(logical_axes(config, pair=pair))
    return lambda path, shape: parameter_sharding(mesh, axes[path], shape)


def open_artifact(path: str | Path, base_at: Path | None = None) -> Artifact:
    """Opens a run, an anchor or a model.

    Args:
        base_at: where the anchor of a pair's run lies, or the model of a router's run.

    Raises:
        UserError: there is none, its description contradicts itself, its format is newer than this
            version, or it stands on no anchor.
    """
    path = path_of(path)
    description, config = read_description(path)
    kind, experts = description["kind"], tuple(description["experts"])
    if kind == "run":
        integrity.check_run(path, description, config)
    if base_at is not None and "base" not in description:
        raise UserError(
            f"{path} is no run of a pair or a router ({description.get('run', kind)}), and needs no"
            " other directory; leave out --anchor"
        )
    return Artifact(path, kind, config, experts, description, base_at)


def places_of(run: Path, recorded: str) -> Iterator[str | Path]:
    """Where something may lie that a run found at `recorded`, the likeliest place first.

    There, or where it was as seen from the run, if both were moved or copied.
    """
    # Another bucket than the run's is asked last: perhaps it cannot even be read from here.
    bucket = "/".join(recorded.split("/", 3)[:3])
    is_far = in_bucket(recorded) and not str(run).startswith(f"{bucket}/")
    if not is_far:
        yield recorded
    above = [path for path in absolute(run).parents if bucket_of(path) or not in_bucket(run)]
    parts = [part for part in recorded.removeprefix(BUCKETS).split("/") if part]
    for folder in above[:LEVELS]:
        for count in range(1, min(len(parts), LEVELS) + 1):
            place = folder.joinpath(*parts[-count:])
            if ".." not in parts and is_there(place):
                yield place
    if is_far:
        yield recorded


def active_among(config: ModelConfig, experts: int) -> int:
    """How many experts a token uses once the model has this many.

    A number that the user gave stays. The default follows the number of experts.
    """
    given = config.n_active != min(config.n_experts, DEFAULT_ACTIVE)
    return min(config.n_active if given else DEFAULT_ACTIVE, experts)


def describe(params: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The `tensors` of a description: each one's dtype and shape, by its path."""
    return {
        path: {"dtype": str(a.dtype), "shape": list(a.shape)} for path, a in flatten(params).items()
    }
