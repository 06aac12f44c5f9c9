"""The sections of a training run."""

import dataclasses
import datetime
import math
import os
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flexolmo_jax.errors import UserError
from flexolmo_jax.kernels import Kernels

from .mesh import MeshConfig
from .model import ModelConfig
from .reading import END, Reading, without_suffixes
from .section import Section, expect

LINE = 1000  # the most characters of anything that an owner states
ONE_LINE = f"one printable line of at most {LINE} characters"
SEQUENCES = 2**53 - 1  # the largest integer that every JSON reader can hold
Remat = Literal["none", "dots", "ffn", "outputs", "attention", "full", "offload"]
Loss = Literal["all", "assistant"]
IdType = Literal["", "uint16", "uint32", "int32", "int64"]
Date = typing.NewType("Date", str)  # YYYY-MM-DD; from Python also a date


@dataclass(frozen=True)
class Dataset(Section):
    """One source of a mixture: a prepared directory, token files, or raw documents, which are
    prepared into a cache first."""

    path: str = ""
    weight: float = 1.0
    name: str = ""  # default: the path's last part, without the suffixes of documents and tokens
    dtype: IdType = ""  # of token files without NumPy's header; default: see data/tokens.py

    @property
    def title(self) -> str:
        place = os.path.abspath(os.path.expanduser(self.path))  # ".." has a name too
        name = without_suffixes(Path(place).name)
        return self.name or re.sub(r"(?<=.)\.(npy|bin)$", "", name)

    def check(self) -> None:
        expected = "a prepared directory or a file of documents"
        expect(bool(self.path), "data path", self.path, expected)
        is_weight = 0 < self.weight < math.inf
        expect(is_weight, f"weight of {self.path}", self.weight, "a positive, finite number")


@dataclass(frozen=True)
class DataConfig(Section):
    at = "data"

    train: tuple[Dataset, ...] = ()
    # scored whole, or by their held-out records: see `evaluation_sources` in train/sources.py;
    # default: held-out records of the training sources
    eval: tuple[Dataset, ...] = ()
    # a tokenizer.json or a directory with one; default: the anchor's (pair, router) or the prepared
    # data's
    tokenizer: str = ""
    batch_size: int = 32  # records a step, over all devices
    seq_len: int = 256
    # what is learnt and scored of conversations: all tokens, or only what the assistant says;
    # documents of text count whole
    loss: Loss = "all"
    # of raw documents, but not of prepared ones. The key or column of their text; a.b is b in a
    text_key: str = "text"
    separator: str = END  # the line that ends a document of a .txt; "": each file is one document
    skip_bad: bool = False  # leave out, and count, what is no document; else the first is an error
    strict: bool = False  # what a folder holds beside documents is an error

    @property
    def reading(self) -> Reading:
        return Reading(self.text_key, self.separator, self.skip_bad, self.strict)

    def check(self) -> None:
        expect(bool(self.train), "data.train", "nothing", "a list of {path, weight, name}")
        self.reading.check("data.text_key", "data.separator")
        self.expect_positive("batch_size")
        self.expect("seq_len", self.seq_len > 1, "at least 2")
        for dataset in (*self.train, *self.eval):
            dataset.check()


@dataclass(frozen=True)
class TrainConfig(Section):
    at = "train"

    steps: int = 100
    seed: int = 0
    # anchor and joint runs: start from the weights of this run, anchor or model instead of random
    # ones
    init: str = ""
    # microbatches a step: the memory is smaller, the gradient the same up to rounding (but for
    # optim.load_balance, which is a microbatch's own)
    accumulate: int = 1
    eval_every: int = 0  # steps between evaluations; 0: only at the end
    # records of each evaluation set that in-loop evaluation reads: a sample spread evenly over it
    eval_records: int = 64
    save_every: int = 0  # steps between checkpoints; 0: only at the end, and by time
    # after this long without a checkpoint there is one; 0: never. benchmarks/goodput.py chose 10
    save_minutes: float = 10.0
    keep: int = 2  # newest checkpoints kept, beside the best
    # the run's last checkpoint stands for the mean of so many of its newest; 0: for itself
    average: int = 0
    log_every: int = 1
    # of activations and matrix products; parameters stay float32
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    # what the forward pass keeps for the backward pass, which computes the rest again: ever more
    # from "full" to "none"; "offload": as "outputs", in the host's memory
    remat: Remat = "none"
    # a step that takes longer than this many seconds, and longer than four times the median of the
    # last, ends the run, with the stacks of its threads; 0: an hour
    watchdog: float = 600.0
    profile: str = ""  # START:STOP: steps of which a profile is written, for xprof
    # a step whose loss or gradient norm lies more than this many standard deviations above the mean
    # of the last 128 steps is not applied; 0: all are
    skip_spikes: float = 0.0

    def check(self) -> None:
        self.expect_positive("steps", "accumulate", "keep", "log_every", "eval_records")
        self.expect_not_negative("eval_every", "save_every", "save_minutes", "seed", "watchdog")
        self.expect_not_negative("skip_spikes")
        is_kept = self.average == 0 or 2 <= self.average <= self.keep
        self.expect("average", is_kept, f"0, or 2 to train.keep ({self.keep})")
        names_steps = not self.profile or self.profiled is not None
        self.expect("profile", names_steps, "START:STOP, two steps, as 10:13")

    @property
    def profiled(self) -> tuple[int, int] | None:
        """The first and the last step of `profile`; None where it names none."""
        match = re.fullmatch(r"([1-9][0-9]*):([1-9][0-9]*)", self.profile)
        return (int(match[1]), int(match[2])) if match and int(match[1]) <= int(match[2]) else None


@dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW with linear warm-up and a cosine. The defaults are the upstream code's values; the
    configs that ship explain them."""

    at = "optim"

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
    # of router rows and biases; 0: lr. Where an expert learns in few steps, its router needs more
    router_lr: float = 0.0
    z_loss: float = 1e-5  # on the language model's logsumexp
    router_z_loss: float = 0.0  # pair runs: 1e-3
    load_balance: float = 0.0  # joint runs: keeps experts in use

    def check(self) -> None:
        self.expect_positive("lr")
        is_share = 0 <= self.final_fraction <= 1
        self.expect("final_fraction", is_share, "a number from 0 to 1")
        self.expect_not_negative("router_lr", "warmup", "schedule_steps", "weight_decay")
        self.expect_not_negative("z_loss", "router_z_loss", "load_balance")
        for key in ("beta1", "beta2"):
            self.expect(key, 0 <= getattr(self, key) < 1, "a number from 0 to below 1")
        self.expect_positive("eps")
        self.expect("clip", self.clip > 0, "a positive number")  # .inf: nothing is cut


@dataclass(frozen=True)
class PairConfig(Section):
    """The anchor and one new expert. The new expert starts as a copy of the anchor's."""

    at = "pair"

    anchor: str = ""
    name: str = ""
    # for the manifest: free text
    domain: str = ""
    owner: str = "unspecified"
    licence: str = "unspecified"
    expires: Date = Date("")  # the licence's last day; empty: it does not end
    # of the contribution: it takes the place of earlier ones, whose sequence is lower
    sequence: int = 1
    # of the tokens: from public text the router learns what to leave to others; the paper has none
    public_share: float = 0.3
    # how much -ln p(the expert a text belongs to) counts, at every router; needs public text
    contrast: float = 0.3
    # standard deviation of noise on the new expert's router logits in training: after a merge other
    # experts' logits change its share
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
        expect(bool(self.anchor), "pair.anchor", "nothing", "the path of a published anchor")
        expect(bool(self.name), "pair.name", "nothing", "the expert's name")
        self.expect("name", self.name != "anchor", "another name: the anchor's expert has it")
        for key in ("owner", "domain", "licence"):
            self.expect(key, _is_line(getattr(self, key)), ONE_LINE)
        in_range = 1 <= self.sequence <= SEQUENCES
        self.expect("sequence", in_range, f"a number from 1 to {SEQUENCES}")
        is_day = not self.expires or _is_date(self.expires)
        self.expect("expires", is_day, "a date such as 2027-12-31")
        is_share = 0 <= self.public_share < 1
        self.expect("public_share", is_share, "a share from 0 to below 1")
        self.expect_not_negative("contrast", "router_noise")


@dataclass(frozen=True)
class RouterConfig(Section):
    """Training of router rows and biases only, on public text and proxies, with every expert
    active."""

    at = "router"

    model: str = ""

    def check(self) -> None:
        expect(bool(self.model), "router.model", "nothing", "the path of a merged model")


@dataclass(frozen=True)
class RunConfig(Section):
    """One training run. The resolved config is saved in the run's directory."""

    run: Literal["anchor", "pair", "router", "joint"] = "anchor"
    kernels: Kernels = "auto"  # that route tokens: the platform's, plain XLA's or Pallas
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    pair: PairConfig | None = None
    router: RouterConfig | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)
    stated: tuple[str, ...] = field(default=(), compare=False)  # keys of `model` that were given

    def check(self) -> None:
        self._check_kind()
        sections = (self.model, self.data, self.train, self.optim, self.pair, self.router)
        for section in (*sections, self.mesh):
            if section is not None:
                section.check()
        if self.run == "pair":  # its manifest names them
            for dataset in (*self.data.train, *self.data.eval):
                name = f"name of {dataset.path!r}"
                expect(_is_line(dataset.title), name, dataset.title, ONE_LINE)
        divides = self.data.batch_size % self.train.accumulate == 0
        of_batch = f"a divisor of data.batch_size ({self.data.batch_size})"
        self.train.expect("accumulate", divides, of_batch)
        if not (self.pair or self.router or self.train.init):  # which have another's architecture
            self._check_length()

    @property
    def paths(self) -> dict[str, str]:
        """Whatever the run reads, by the key that gives its place."""
        found: dict[str, str] = {}
        self.reading(lambda key, path: found.setdefault(key, path))
        return {key: path for key, path in found.items() if path}

    def reading(self, place: Callable[[str, str], str]) -> "RunConfig":
        """The run with other places of what it reads: `place` of the key and its path, "" for
        none."""
        data, pair, router = self.data, self.pair, self.router
        of_data: dict[str, typing.Any] = {
            name: tuple(
                dataclasses.replace(source, path=place(f"data.{name}[{i}].path", source.path))
                for i, source in enumerate(getattr(data, name))
            )
            for name in ("train", "eval")
        }
        of_data["tokenizer"] = place("data.tokenizer", data.tokenizer)
        if pair is not None:
            anchor, public = place("pair.anchor", pair.anchor), place("pair.public", pair.public)
            pair = dataclasses.replace(pair, anchor=anchor, public=public)
        if router is not None:
            router = dataclasses.replace(router, model=place("router.model", router.model))
        return dataclasses.replace(
            self,
            data=dataclasses.replace(data, **of_data),
            train=dataclasses.replace(self.train, init=place("train.init", self.train.init)),
            pair=pair,
            router=router,
        )

    def of_model(self, model: ModelConfig, start: str) -> "RunConfig":
        """The run with the architecture of what it starts from, at `start`. Raises UserError for
        longer records than that reads, and for a key of `model` that says something else."""
        run = dataclasses.replace(self, model=model)
        run._check_length()
        for key in self.stated:
            given, found = getattr(self.model, key), getattr(model, key)
            # a plan says how many experts there will be; what is merged may have others
            is_planned = self.run == "router" and key in ("n_experts", "n_active")
            if given != found and not is_planned and (key, given) != ("vocab_size", 0):
                raise UserError(
                    f"model.{key} is {given!r:.80}, and {found!r:.80} in {start}, whose"
                    " architecture the run has; leave it out"
                )
        return run

    def _check_length(self) -> None:
        limit = self.model.max_seq_len
        self.data.expect(
            "seq_len", self.data.seq_len <= limit, f"at most model.max_seq_len ({limit})"
        )

    def _check_kind(self) -> None:
        """Raises UserError for sections and values that another kind of run has."""
        for name, section in (("pair", self.pair), ("router", self.router)):
            if self.run == name and section is None:
                raise UserError(f"run: {name} needs the section {name!r}; got none; add it")
            if self.run != name and section is not None:
                raise UserError(
                    f"section {name!r} belongs to run: {name}; got run: {self.run}; remove the"
                    " section or change run"
                )
        if self.run in ("pair", "router"):
            nothing = f"nothing: a {self.run} run starts from its {self.run} section"
            self.train.expect("init", not self.train.init, nothing)
        if self.run == "anchor":
            is_dense = self.model.n_experts == 1
            self.model.expect("n_experts", is_dense, "1 for an anchor; run: joint trains several")


def check_microbatch(run: RunConfig, sizes: Mapping[str, int]) -> None:
    """Raises UserError where a microbatch does not divide over the mesh axes that a batch is spread
    over."""
    microbatch = run.data.batch_size // run.train.accumulate
    devices = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    if microbatch % devices:
        raise UserError(
            f"a microbatch of {microbatch} records (data.batch_size {run.data.batch_size} /"
            f" train.accumulate {run.train.accumulate}) does not divide over the {devices} devices"
            " of mesh.data x fsdp x expert; change one of them"
        )


def _is_line(text: str) -> bool:
    return len(text) <= LINE and text.isprintable()


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
