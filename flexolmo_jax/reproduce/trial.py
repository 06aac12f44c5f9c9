"""What a study makes with one seed: its paths, and the runs and choices that make it."""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.config import ModelConfig, RunConfig, Settings
from flexolmo_jax.coordinator.router import tune
from flexolmo_jax.data.documents import read_training_documents
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.evals.extraction import sample_documents
from flexolmo_jax.evals.upcycle import steps_of_flops
from flexolmo_jax.exchange.anchor import publish
from flexolmo_jax.owner.package import package
from flexolmo_jax.owner.pair import train_pair
from flexolmo_jax.owner.proxy import select_proxies
from flexolmo_jax.storage.files import make_folder, remove_file, write_text
from flexolmo_jax.train.flops import step_flops
from flexolmo_jax.train.pretrain import pretrain

from .spec import Spec


class Trial:
    """All that is made with one seed."""

    def __init__(self, spec: Spec, root: Path, seed: int):
        self.spec, self.root, self.seed = spec, root, seed
        self.path = root / f"seed{seed}"
        self.anchor = (root if spec.open_anchor else self.path) / "anchor"

    def data(self, name: str) -> Path:
        return self.root / "data" / name

    def text(self, name: str) -> Path:
        return self.root / "text" / f"{name}.jsonl"

    @property
    def public_text(self) -> list[Path]:
        return [self.text(name) for name in self.spec.public]

    def records(
        self, *names: str, shares: Mapping[str, float] | None = None
    ) -> list[dict[str, Any]]:
        """A run's `data.train`: these sources, alike or by shares."""
        return [
            {"path": str(self.data(name)), "name": name, "weight": (shares or {}).get(name, 1.0)}
            for name in names
        ]

    def contributions(self, variant: str = "pairs") -> list[Path]:
        return [self.path / variant / name for name in self.spec.domains]

    @property
    def active(self) -> int:
        """Experts that a token uses in jointly trained mixtures: as many as a merge's default."""
        return min(4, len(self.spec.domains) + 1)

    def train_anchor(self, out: Path) -> None:
        section = {"model": self.spec.model, **self.spec.anchor}
        pretrain(self.spec.run("anchor", section, self.records("public"), self.seed), out)

    def publish_anchor(self) -> None:
        run = self.path / "anchor-run"
        publish(run, self.public_text, self.anchor, dtype=self.spec.release_dtype)

    def continued(self, domain: str) -> RunConfig:
        """The anchor, all weights of which are trained further.

        On a domain that makes the domain's dense model, on public text the control.
        """
        start = {"train.init": str(self.anchor)}
        return self.spec.run("anchor", self.spec.dense, self.records(domain), self.seed, **start)

    def pair(self, domain: str, overrides: Mapping[str, Any]) -> RunConfig:
        names = {
            "pair.anchor": str(self.anchor),
            "pair.name": domain,
            "pair.public": str(self.data("public")),
        }
        return self.spec.run(
            "pair", self.spec.pair, self.records(domain), self.seed, **names, **overrides
        )

    def train_expert(self, variant: str, overrides: Mapping[str, Any], domain: str) -> None:
        work = self.path / variant / f"{domain}.run"
        train_pair(self.pair(domain, overrides), work)
        package(work, self.path / variant / domain)

    def choose_proxies(self, domain: str) -> None:
        out = self.path / f"proxies-{domain}.jsonl"
        remove_file(out)  # left where an earlier start was killed before it wrote its report
        chosen = select_proxies(
            self.anchor,
            [self.text(domain)],
            self.public_text,
            out,
            share=self.spec.proxy_share,
            diversity=self.spec.proxy_diversity,
        )
        write_json(self.path / f"proxies-{domain}.json", chosen._asdict() | {"share": chosen.share})

    def tune_router(self, merged: str = "merged", tuned: str = "tuned") -> None:
        proxies = {domain: self.path / f"proxies-{domain}.jsonl" for domain in self.spec.domains}
        config, section = self.path / f"{tuned}.yaml", self.spec.router
        data = {**section.get("data", {}), "seq_len": self.spec.seq_len}
        write_text(config, json.dumps({**section, "data": data}))
        tune(
            self.path / merged,
            proxies,
            [self.data("public")],
            self.path / tuned,
            settings=Settings(config, [f"train.seed={self.seed}"]),
        )

    def joint(self, times: int) -> RunConfig:
        """A run on all data, mixed as the pairs had it, with `times` the FLOPs of all pairs."""
        anchor = open_artifact(self.anchor).config
        start = open_artifact(self.path / "joint-start").config
        run, report = self.joint_of(times, anchor, start)
        write_json(self.path / f"flops-{times}x.json", report)
        return run

    def joint_of(
        self, times: int, anchor: ModelConfig, mixture: ModelConfig
    ) -> tuple[RunConfig, dict[str, float]]:
        """The run, and a report of its FLOPs and the pairs'."""
        pairs = [self.pair(domain, {}) for domain in self.spec.domains]
        spent = times * sum(pair.train.steps * step_flops(pair, anchor).model for pair in pairs)
        assert pairs[0].pair is not None
        public = pairs[0].pair.public_share
        shares = dict.fromkeys(self.spec.domains, (1 - public) / len(pairs))
        if public:
            shares["public"] = public
        sources = self.records(*shares, shares=shares)
        init = {"train.init": str(self.path / "joint-start")}
        run = self.spec.run("joint", self.spec.joint, sources, self.seed, **init)
        run = dataclasses.replace(run, model=mixture)
        train = dataclasses.replace(run.train, steps=steps_of_flops(spent, run))
        run = dataclasses.replace(run, train=train)
        of_run = run.train.steps * step_flops(run, mixture).model
        return run, {
            "pairs": spent / times,
            "times": times,
            "joint": of_run,
            "joint_of_pairs": of_run * times / spent,
        }

    def btx(self) -> RunConfig:
        init = {"train.init": str(self.path / "btx-start")}
        return self.spec.run("joint", self.spec.btx, self.records("public"), self.seed, **init)

    def attacked_documents(self) -> list[list[int]]:
        """Token ids of what is attacked: training documents of the first private domain."""
        spec = self.spec
        texts = read_training_documents(self.text(spec.domains[0]))
        tokenizer = open_artifact(self.anchor).tokenizer
        count, prefix = spec.extraction_documents, spec.extraction_prefix
        return sample_documents(texts, tokenizer, count, prefix, spec.extraction_tokens)

    def train_overfit(self, out: Path) -> None:
        """The anchor, trained on nothing but these documents: the attack should succeed on it."""
        tokenizer = open_artifact(self.anchor).tokenizer
        text, data = self.path / "attacked.jsonl", self.path / "attacked-data"
        if not data.exists():
            attacked = map(tokenizer.decode, self.attacked_documents())
            write_text(text, "".join(json.dumps({"text": one}) + "\n" for one in attacked))
            prepare([text], tokenizer, self.spec.seq_len, data, heldout=0)
        start, sources = {"train.init": str(self.anchor)}, [{"path": str(data)}]
        pretrain(self.spec.run("anchor", self.spec.overfit, sources, self.seed, **start), out)

    def pairs_of_domains(self) -> list[tuple[str, str]]:
        return list(itertools.permutations(self.spec.domains, 2))


def write_json(path: Path, value: Any) -> None:
    make_folder(path.parent)
    write_text(path, json.dumps(value, indent=1) + "\n")
