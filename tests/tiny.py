"""The whole story in miniature, for tests: four domains of made-up text, an anchor, three experts,
their merge.

Real files made by the real functions, once for all tests of a process: a model of 2 layers and
width 32 trained for 20 steps.
"""

import contextlib
import dataclasses
import gc
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from flexolmo_jax.config import RunConfig, dump_yaml, resolve
from flexolmo_jax.coordinator.merge import merge
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.tokenizer import Tokenizer, train_tokenizer
from flexolmo_jax.exchange.anchor import publish
from flexolmo_jax.owner.package import package
from flexolmo_jax.owner.pair import train_pair
from flexolmo_jax.plan.report import size_of
from flexolmo_jax.train import loop
from flexolmo_jax.train.pretrain import pretrain
from tests.families import FAMILIES

SEQ_LEN = 32
# The same story on an anchor of another family: TINY_FAMILY=llama python -m pytest ...
MODEL: dict[str, Any] = (
    dict(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ffn=64, max_seq_len=64)
    | FAMILIES[os.environ.get("TINY_FAMILY", "olmo2")]
)
Train = Callable[[RunConfig, Path], Any]
DOMAINS = ("code", "law", "care")
# Subjects, verbs and objects that no two domains share.
WORDS = {
    "public": (
        "the river,a farmer,our village,the old mill",
        "feeds,crosses,remembers,paints",
        "the valley,two bridges,the winter",
    ),
    "code": (
        "def parse(),class Queue,self.buffer",
        "returns,raises,yields,asserts",
        "None,ValueError(x),list[int],{key: 0}",
    ),
    "law": (
        "the tenant,said Party,a Court",
        "shall waive,may appeal,hereby grants,must indemnify",
        "Clause 7,all liability,the deed",
    ),
    "care": (
        "the patient,Dr. Osei,a nurse",
        "reports,administers,denies,monitors",
        "chest pain,5 mg heparin,acute fever,the biopsy",
    ),
}


def documents(domain: str, count: int, seed: int = 0) -> list[str]:
    """Different documents of 1 to 6 sentences."""
    rng = np.random.default_rng(seed)
    subjects, verbs, objects = (part.split(",") for part in WORDS[domain])

    def sentence() -> str:
        return f"{rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(objects)}."

    return [
        f"{domain} {i}: " + " ".join(sentence() for _ in range(rng.integers(1, 7)))
        for i in range(count)
    ]


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def run_config(kind: str, train: Path, *overrides: str, **sections: Any) -> RunConfig:
    """A run of 20 steps of 8 records on one device. `overrides` are `a.b=c`; `sections` are whole
    sections (pair, router). Pairs and routers have the architecture of what they start from."""
    tree = {
        "run": kind,
        "model": {} if kind in ("pair", "router") else MODEL,
        "data": {"train": [{"path": str(train)}], "batch_size": 8, "seq_len": SEQ_LEN},
        "train": {"steps": 20},
        "optim": {"lr": 3e-3, "warmup": 2},
        "mesh": {"fsdp": 1},
        **sections,
    }
    return resolve(tree, overrides)


def pair_config(anchor: Path, train: Path, name: str, *overrides: str) -> RunConfig:
    return run_config(
        "pair",
        train,
        "optim.weight_decay=0",
        "optim.router_z_loss=1e-3",
        *overrides,
        pair={"anchor": str(anchor), "name": name},
    )


def train_until(last: int, train: Train, config: RunConfig, out: Path) -> None:
    """Stops after a step, as a signal does."""

    def step(self: loop.Trainer, number: int, compiles: bool, whole: Any = loop.Trainer.step):
        whole(self, number, compiles)
        if number == last:
            self._stop_status = lambda: 42

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(loop.Trainer, "step", step)
        train(config, out)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that everything below lies in."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def corpora(tiny: Path) -> dict[str, Path]:
    """A JSONL file of 160 documents for each domain, "public" among them."""
    return {
        domain: write_jsonl(tiny / f"{domain}.jsonl", documents(domain, 160)) for domain in WORDS
    }


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny: Path, corpora: dict[str, Path]) -> Tokenizer:
    return train_tokenizer([corpora["public"]], 320, tiny / "tokenizer.json")


@pytest.fixture(scope="session")
def prepared(tiny: Path, corpora: dict[str, Path], tiny_tokenizer: Tokenizer) -> dict[str, Path]:
    """Packed records of each domain, a tenth of the documents held out."""
    for domain, path in corpora.items():
        prepare([path], tiny_tokenizer, SEQ_LEN, tiny / "data" / domain, heldout=0.1, workers=1)
    return {domain: tiny / "data" / domain for domain in corpora}


@pytest.fixture(scope="session")
def anchor_run(tiny: Path, prepared: dict[str, Path]) -> Path:
    pretrain(run_config("anchor", prepared["public"]), tiny / "anchor-run")
    return tiny / "anchor-run"


@pytest.fixture(scope="session")
def anchor(tiny: Path, anchor_run: Path, corpora: dict[str, Path]) -> Path:
    """Published in bfloat16."""
    return publish(anchor_run, [corpora["public"]], tiny / "anchor").path


@pytest.fixture(scope="session")
def anchor32(tiny: Path, anchor_run: Path, corpora: dict[str, Path]) -> Path:
    """The same, published in float32: another anchor, by its fingerprint."""
    return publish(anchor_run, [corpora["public"]], tiny / "anchor32", dtype="float32").path


@pytest.fixture(scope="session")
def pair_runs(tiny: Path, anchor: Path, prepared: dict[str, Path]) -> dict[str, Path]:
    for domain in DOMAINS:
        train_pair(
            pair_config(anchor, prepared[domain], domain, "train.steps=8"), tiny / "pairs" / domain
        )
    return {domain: tiny / "pairs" / domain for domain in DOMAINS}


@pytest.fixture(scope="session")
def contributions(tiny: Path, pair_runs: dict[str, Path]) -> dict[str, Path]:
    return {
        domain: package(run, tiny / "contributions" / domain).path
        for domain, run in pair_runs.items()
    }


@pytest.fixture(scope="session")
def model(tiny: Path, anchor: Path, contributions: dict[str, Path]) -> Path:
    """All three experts merged, two of four active."""
    return merge(anchor, list(contributions.values()), tiny / "model", active=2).path


Held = Callable[[Any, str], list[int]]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    """`held(module, "function")`: the bytes of live arrays on each device, beside those that were
    there before, at each call of that function from now on."""

    def watch(module: Any, name: str) -> list[int]:
        gc.collect()
        found: list[int] = []
        before, function = size_of(jax.live_arrays()), getattr(module, name)

        def watched(*args: Any, **options: Any) -> Any:
            gc.collect()
            found.append(size_of(jax.live_arrays()) - before)
            return function(*args, **options)

        monkeypatch.setattr(module, name, watched)
        return found

    return watch


@dataclasses.dataclass(frozen=True)
class Paths:
    """One of everything that a verb takes."""

    public: Path  # documents
    code: Path
    data: Path  # the public ones, prepared
    config: Path  # of the anchor's run
    run: Path
    anchor: Path
    other_anchor: Path
    pair: Path  # code's run
    contributions: tuple[Path, ...]  # code's first
    model: Path  # of code, law and care


@pytest.fixture(scope="module")
def paths(
    tiny, corpora, prepared, anchor_run, anchor, anchor32, pair_runs, contributions, model
) -> Paths:
    config = tiny / "anchor.yaml"
    config.write_text(dump_yaml(run_config("anchor", prepared["public"])))
    return Paths(
        public=corpora["public"], code=corpora["code"], data=prepared["public"], config=config,
        run=anchor_run, anchor=anchor,
        other_anchor=anchor32, pair=pair_runs["code"], contributions=tuple(contributions.values()),
        model=model,
    )  # fmt: skip
