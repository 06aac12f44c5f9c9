"""Every config: frozen dataclasses, loaded from strict YAML, overridden with `a.b=c`, checked
before anything heavy is imported.

A run's YAML has the sections of `RunConfig`. `model.preset` fills in an architecture, which single
keys then override.
"""

import copy
import dataclasses
import datetime
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from flexolmo_jax.errors import UserError
from flexolmo_jax.plain_yaml import parse_yaml, read_yaml

T = TypeVar("T")
LAYERS = 1024  # the most that a model may have
LEVELS = 8  # of sections in a key, more than any has
LINE = 1000  # characters of what an owner states
SEQUENCES = 2**53 - 1  # the largest integer that every JSON reader has
Date = typing.NewType("Date", str)  # YYYY-MM-DD; YAML reads one without quotes as a date of its own


class _Config:
    """What the sections share: `check` raises UserError for values that cannot work together."""

    def check(self) -> None: ...


@dataclass(frozen=True)
class ModelConfig(_Config):
    """The architecture: OLMo 2 with `n_experts` experts an FFN. Everything a stranger needs to read
    the weights."""

    vocab_size: int = 0  # 0: the tokenizer's, rounded up to a multiple of 128
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 8
    n_kv_heads: int = 8
    d_ffn: int = 688
    n_experts: int = 1  # the anchor's included; 1 is a dense model
    n_active: int = 1  # experts a token uses (k)
    # experts other than the anchor's have a bias <= 0; HF's format has no place for it
    router_bias: bool = True
    init_bias: float = -0.01  # just below 0: min(b, 0) has no gradient above
    rope_theta: float = 5e5
    norm_eps: float = 1e-6
    init_std: float = 0.02
    max_seq_len: int = 4096

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    def check(self) -> None:
        for name, most in LARGEST.items():
            _expect(
                0 < getattr(self, name) <= most,
                f"model.{name}",
                getattr(self, name),
                f"a positive number, at most {most}",
            )
        _expect(
            0 <= self.vocab_size <= 2**24,
            "model.vocab_size",
            self.vocab_size,
            f"a number from 0 to {2**24}",
        )
        for name in ("rope_theta", "norm_eps", "init_std"):
            _expect(
                0 < getattr(self, name) < math.inf,
                f"model.{name}",
                getattr(self, name),
                "a positive, finite number",
            )
        _expect(math.isfinite(self.init_bias), "model.init_bias", self.init_bias, "a finite number")
        _expect(
            self.d_model % self.n_heads == 0,
            "model.n_heads",
            self.n_heads,
            f"a divisor of model.d_model ({self.d_model})",
        )
        _expect(
            self.d_head % 2 == 0,
            "model.d_model / model.n_heads",
            self.d_head,
            "an even head size (rotary positions)",
        )
        _expect(
            self.n_heads % self.n_kv_heads == 0,
            "model.n_kv_heads",
            self.n_kv_heads,
            f"a divisor of n_heads ({self.n_heads})",
        )
        _expect(
            self.n_active <= self.n_experts,
            "model.n_active",
            self.n_active,
            f"at most model.n_experts ({self.n_experts})",
        )


# The most that a model of ours, or of a stranger, may have. No real one comes near; what is beyond
# would only fill memory.
LARGEST = {
    "d_model": 2**17,
    "n_layers": LAYERS,
    "n_heads": 2**13,
    "n_kv_heads": 2**13,
    "d_ffn": 2**20,
    "n_experts": 4096,
    "n_active": 4096,
    "max_seq_len": 2**30,
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    # OLMo-2-0425-1B
    "1b": dict(vocab_size=100352, d_model=2048, n_layers=16, n_heads=16, n_kv_heads=16, d_ffn=8192),
    # OLMo-2-1124-7B
    "7b": dict(
        vocab_size=100352, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, d_ffn=11008
    ),
}


@dataclass(frozen=True)
class Dataset(_Config):
    """One source of a mixture: a prepared directory, or raw documents, which are prepared into a
    cache first."""

    path: str = ""
    weight: float = 1.0
    name: str = ""  # default: the path's last part without suffixes

    @property
    def title(self) -> str:
        return self.name or Path(self.path).name.split(".")[0]

    def check(self) -> None:
        _expect(
            bool(self.path), "data path", self.path, "a prepared directory or a file of documents"
        )
        _expect(self.weight > 0, f"weight of {self.path}", self.weight, "a positive number")


@dataclass(frozen=True)
class DataConfig(_Config):
    train: tuple[Dataset, ...] = ()
    eval: tuple[Dataset, ...] = ()  # held-out records of these; default: of the training sources
    # a tokenizer.json or a directory with one; default: the anchor's (pair, router) or the prepared
    # data's
    tokenizer: str = ""
    batch_size: int = 32  # records a step, over all devices
    seq_len: int = 256

    def check(self) -> None:
        _expect(bool(self.train), "data.train", "nothing", "a list of {path, weight, name}")
        _expect(self.batch_size > 0, "data.batch_size", self.batch_size, "a positive number")
        _expect(self.seq_len > 1, "data.seq_len", self.seq_len, "at least 2")
        for dataset in (*self.train, *self.eval):
            dataset.check()


@dataclass(frozen=True)
class TrainConfig(_Config):
    steps: int = 100
    seed: int = 0
    # anchor and joint runs: start from the weights of this run, anchor or model instead of random
    # ones
    init: str = ""
    accumulate: int = 1  # microbatches a step; the gradient is the same, the memory smaller
    eval_every: int = 0  # steps between evaluations; 0: only at the end
    eval_records: int = 64  # held-out records of each source that in-loop evaluation reads
    save_every: int = 0  # steps between checkpoints; 0: only at the end
    keep: int = 2  # newest checkpoints kept, beside the best
    log_every: int = 1
    # of activations and matrix products; parameters stay float32
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes
    # seconds after which a step that has not ended ends the run, with the stacks of its threads; 0:
    # an hour
    watchdog: float = 600.0
    profile: str = ""  # START:STOP: steps of which a profile is written, for xprof

    def check(self) -> None:
        for name in ("steps", "accumulate", "keep", "log_every", "eval_records"):
            _expect(
                getattr(self, name) > 0, f"train.{name}", getattr(self, name), "a positive number"
            )
        for name in ("eval_every", "save_every", "seed", "watchdog"):
            _expect(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        _expect(
            not self.profile or self.profiled is not None,
            "train.profile",
            self.profile,
            "START:STOP, two steps, as 10:13",
        )

    @property
    def profiled(self) -> tuple[int, int] | None:
        """The first and the last step of `profile`; None where it names none."""
        match = re.fullmatch(r"([1-9][0-9]*):([1-9][0-9]*)", self.profile)
        return (int(match[1]), int(match[2])) if match and int(match[1]) <= int(match[2]) else None


@dataclass(frozen=True)
class OptimConfig(_Config):
    """AdamW with linear warm-up and a cosine; upstream's values are the defaults. See facts in the
    configs themselves."""

    lr: float = 9e-4
    warmup: int = 20
    # where the cosine would end; 0: train.steps. The paper's anchor lays it out for 5T tokens and
    # stops at 1T
    schedule_steps: int = 0
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices but the embedding; pair runs use 0
    clip: float = 1.0  # global norm
    z_loss: float = 1e-5  # on the language model's logsumexp
    router_z_loss: float = 0.0  # pair runs: 1e-3
    load_balance: float = 0.0  # joint runs: keeps experts in use

    def check(self) -> None:
        _expect(self.lr > 0, "optim.lr", self.lr, "a positive number")
        _expect(
            0 <= self.final_fraction <= 1,
            "optim.final_fraction",
            self.final_fraction,
            "a number from 0 to 1",
        )
        for name in (
            "warmup",
            "schedule_steps",
            "weight_decay",
            "z_loss",
            "router_z_loss",
            "load_balance",
        ):
            _expect(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "0 or more")
        for name in ("beta1", "beta2"):
            _expect(
                0 <= getattr(self, name) < 1,
                f"optim.{name}",
                getattr(self, name),
                "a number from 0 to below 1",
            )
        _expect(self.eps > 0, "optim.eps", self.eps, "a positive number")
        _expect(self.clip > 0, "optim.clip", self.clip, "a positive number")


@dataclass(frozen=True)
class PairConfig(_Config):
    """The anchor and one new expert. The new expert starts as a copy of the anchor's."""

    anchor: str = ""
    name: str = ""
    domain: str = ""  # free text for the manifest
    owner: str = "unspecified"  # free text for the manifest, as the two around it
    licence: str = "unspecified"
    expires: Date = Date("")  # the last day of the licence; nothing: it does not end
    # of the contribution: higher than that of an earlier one whose place it is to take
    sequence: int = 1
    # of the tokens: local contrast, the row learns what to let pass; 0 is the paper's recipe
    public_share: float = 0.3
    # weight of -ln p(its own expert) at every router; idle without public text
    contrast: float = 0.3
    # deviation of noise on the new expert's router logits in training: others will take weight from
    # it
    router_noise: float = 1.0
    public: str = ""  # prepared public records; default: the sample that the anchor carries
    # The router row starts as the domain's mean embedding, at random, as the anchor's own, or as
    # the anchor's mean hidden states.
    row: Literal["embedding", "random", "anchor", "hidden"] = "embedding"
    # whether a hub's model may be fetched and run because the anchor names it as its embedder
    allow_hub_embedder: bool = False
    # false: the expert is trained alone, as in the paper's ablation of coordination
    beside_anchor: bool = True

    @property
    def is_contrasted(self) -> bool:
        """Whether the routers are trained to tell the owner's text from public text."""
        return self.beside_anchor and self.contrast > 0 < self.public_share

    def check(self) -> None:
        _expect(bool(self.anchor), "pair.anchor", "nothing", "the path of a published anchor")
        _expect(bool(self.name), "pair.name", "nothing", "the expert's name")
        _expect(
            self.name != "anchor",
            "pair.name",
            self.name,
            "another name: the anchor's expert has it",
        )
        for key in ("owner", "domain", "licence"):
            _expect(
                _is_line(getattr(self, key)),
                f"pair.{key}",
                getattr(self, key),
                f"one printable line of at most {LINE} characters",
            )
        _expect(
            1 <= self.sequence <= SEQUENCES,
            "pair.sequence",
            self.sequence,
            f"a number from 1 to {SEQUENCES}",
        )
        _expect(
            not self.expires or _is_date(self.expires),
            "pair.expires",
            self.expires,
            "a date such as 2027-12-31",
        )
        _expect(
            0 <= self.public_share < 1,
            "pair.public_share",
            self.public_share,
            "a share from 0 to below 1",
        )
        _expect(self.contrast >= 0, "pair.contrast", self.contrast, "0 or more")
        _expect(self.router_noise >= 0, "pair.router_noise", self.router_noise, "0 or more")


@dataclass(frozen=True)
class RouterConfig(_Config):
    """Training of router rows and biases only, on public text and proxies, with every expert
    active."""

    model: str = ""

    def check(self) -> None:
        _expect(bool(self.model), "router.model", "nothing", "the path of a merged model")


@dataclass(frozen=True)
class MeshConfig(_Config):
    """Devices along each axis; -1 (one axis at most) takes what is left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    expert: int = 1

    def check(self) -> None:
        sizes = dataclasses.astuple(self)
        _expect(
            all(n == -1 or n > 0 for n in sizes),
            "mesh",
            sizes,
            "positive numbers, or -1 for what is left",
        )
        _expect(sizes.count(-1) <= 1, "mesh", sizes, "-1 on one axis at most")

    def sizes(self, devices: int, slices: int = 1) -> dict[str, int]:
        """Devices along each axis, of so many that there are, all in all; -1 resolved.

        Raises UserError for a mesh that is larger, one with -1 that does not divide them, and one
        whose data axis does not span the slices.
        """
        sizes = dataclasses.asdict(self)
        named = math.prod(n for n in sizes.values() if n != -1)
        shown = " x ".join(f"{axis} {n}" for axis, n in sizes.items())
        if -1 in sizes.values():
            if devices % named:
                raise UserError(
                    f"mesh {shown} does not divide {devices} devices; make the product of its axes"
                    " a divisor"
                )
            sizes = {axis: devices // named if n == -1 else n for axis, n in sizes.items()}
        elif named > devices:
            raise UserError(
                f"mesh {shown} needs {named} devices; got {devices}; make the axes smaller"
            )
        if sizes["data"] % slices:
            raise UserError(
                f"mesh.data is {sizes['data']}; expected a multiple of {slices}, the number of"
                " slices, over which it runs"
            )
        return sizes


@dataclass(frozen=True)
class RunConfig(_Config):
    """One training run. The resolved config is saved in the run's directory."""

    run: Literal["anchor", "pair", "router", "joint"] = "anchor"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    pair: PairConfig | None = None
    router: RouterConfig | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def check(self) -> None:
        for name, section in (("pair", self.pair), ("router", self.router)):
            if self.run == name and section is None:
                raise UserError(f"run: {name} needs the section {name!r}; got none; add it")
            if self.run != name and section is not None:
                raise UserError(
                    f"section {name!r} belongs to run: {name}; got run: {self.run}; remove the"
                    " section or change run"
                )
        if self.run in ("pair", "router"):
            _expect(
                not self.train.init,
                "train.init",
                self.train.init,
                f"nothing: a {self.run} run starts from its {self.run} section",
            )
        if self.run == "anchor":
            _expect(
                self.model.n_experts == 1,
                "model.n_experts",
                self.model.n_experts,
                "1 for an anchor; run: joint trains several",
            )
        for section in (
            self.model,
            self.data,
            self.train,
            self.optim,
            self.pair,
            self.router,
            self.mesh,
        ):
            if section is not None:
                section.check()
        # their names are in the manifest
        for dataset in (*self.data.train, *self.data.eval) if self.run == "pair" else ():
            _expect(
                _is_line(dataset.title),
                f"name of {dataset.path!r}",
                dataset.title,
                f"one printable line of at most {LINE} characters",
            )
        micro = self.train.accumulate
        _expect(
            self.data.batch_size % micro == 0,
            "train.accumulate",
            micro,
            f"a divisor of data.batch_size ({self.data.batch_size})",
        )
        limit = self.model.max_seq_len
        _expect(
            self.data.seq_len <= limit,
            "data.seq_len",
            self.data.seq_len,
            f"at most model.max_seq_len ({limit})",
        )


def check_microbatch(run: RunConfig, sizes: Mapping[str, int]) -> None:
    """Raises UserError where a microbatch does not divide over the mesh axes that a batch is spread
    over."""
    microbatch, ways = (
        run.data.batch_size // run.train.accumulate,
        sizes["data"] * sizes["fsdp"] * sizes["expert"],
    )
    if microbatch % ways:
        raise UserError(
            f"a microbatch of {microbatch} records (data.batch_size {run.data.batch_size} /"
            f" train.accumulate {run.train.accumulate}) does not divide over the {ways} devices of"
            " mesh.data x fsdp x expert; change one of them"
        )


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's YAML, applies `section.key=value` overrides and checks the result."""
    return resolve(read_yaml(path), overrides)


def resolve(tree: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """A checked RunConfig from a nested dict (which is left as it was) and overrides."""
    if not isinstance(tree, dict):
        raise UserError(
            f"the config is {tree!r:.80}; expected sections: {', '.join(_fields(RunConfig))}"
        )
    tree = override(tree, overrides)
    model = tree.get("model")
    if isinstance(model, dict) and "preset" in model:
        preset = model.pop("preset")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise UserError(
                f"unknown model.preset {preset!r:.80}; expected one of {', '.join(PRESETS)}"
            )
        tree["model"] = PRESETS[preset] | model
    _refuse_privacy(tree.get("pair"))
    config = build(RunConfig, tree)
    config.check()
    return config


def override(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of a nested dict with `section.key=value` set, whose values are YAML."""
    tree = copy.deepcopy(tree)
    for text in overrides:
        key, equals, value = text.partition("=")
        *branches, leaf = key.split(".")
        if not equals or len(branches) > LEVELS:
            raise UserError(f"--set got {text!r:.200}; expected section.key=value")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise UserError(f"--set got {text!r:.200}, but {branch!r:.80} is not a section")
        try:
            node[leaf] = parse_yaml(value)
        except ValueError as error:
            raise UserError(
                f"--set got {text!r:.200}, whose value is not valid YAML ({error}); quote it"
            ) from None
    return tree


def section_of(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a nested dict, {} where there is none. Raises UserError for something else."""
    section = tree.get(name)
    _expect(isinstance(section, dict | None), name, section, "a section with keys")
    return section or {}


def says(tree: dict[str, Any], overrides: Sequence[str], section: str, key: str) -> bool:
    """Whether a config, or an override of it, gives a key a value of its own."""
    return key in section_of(tree, section) or any(
        override.startswith(f"{section}.{key}=") for override in overrides
    )


def build(cls: type[T], tree: Any, at: str = "") -> T:
    """A dataclass from a nested dict: unknown keys name the nearest key, values must have the
    field's type."""
    if not isinstance(tree, dict):
        raise UserError(
            f"{at or 'the config'} is {tree!r:.80}; expected a section with keys"
            f" {', '.join(_fields(cls))}"
        )
    values = {}
    for key, value in tree.items():
        path = f"{at}.{key}" if at else str(key)
        if key not in _fields(cls):
            near = difflib.get_close_matches(str(key)[:80], _fields(cls), n=1, cutoff=0.5)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"expected one of {', '.join(_fields(cls))}"
            )
            raise UserError(f"unknown config key {path!r:.80}; {hint}")
        values[key] = _convert(typing.get_type_hints(cls)[key], value, path)
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """The nested plain dict of a config: what YAML and JSON files of runs, anchors and models
    hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def dump_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    tree = {key: value for key, value in to_dict(config).items() if value is not None}
    return yaml.safe_dump(tree, sort_keys=False)


def _refuse_privacy(pair: Any) -> None:
    """Takes out a `privacy` that says nothing, as runs of earlier versions have it. Raises
    UserError for one that claims something."""
    if isinstance(pair, dict) and (claim := pair.pop("privacy", None)) is not None:
        raise UserError(
            f"pair.privacy is {claim!r:.80}; training here has no differential privacy yet, so that"
            " no contribution may claim it; remove the key"
        )


def _is_line(text: str) -> bool:
    return len(text) <= LINE and text.isprintable()


def _is_unicode(text: str) -> bool:
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which "\ud800" in quotes makes in YAML
        return False


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls)}


def _convert(hint: Any, value: Any, at: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # only `Section | None` is used
        return None if value is None else _convert(arguments[0], value, at)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, at)
    if origin is tuple:
        _expect(isinstance(value, (list, tuple)), at, value, "a list")
        return tuple(_convert(arguments[0], item, f"{at}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        _expect(value in arguments, at, value, f"one of {', '.join(arguments)}")
        return value
    if hint is Date:
        hint, value = str, value.isoformat() if isinstance(value, datetime.date) else value
    if hint is float and isinstance(value, str):  # YAML reads 1e-3, without a dot, as a string
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is int:
        _expect(abs(value) < 2**63, at, value, "a number of 64 bits")
        value = float(value) if hint is float else value
    wrong = not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)
    _expect(not wrong, at, value, f"a value of type {hint.__name__}")
    _expect(
        not isinstance(value, str) or _is_unicode(value),
        at,
        value,
        "Unicode without the character 0",
    )
    return value


def _expect(holds: bool, what: str, got: Any, expected: str) -> None:
    if not holds:
        raise UserError(f"{what} is {got!r:.200}; expected {expected}")
