"""What a study makes with one seed: where it lies, and the runs and choices that make it."""

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

    def data(self, name: str) -> Path:
        return self.root / "data" / name

    def records(
        self, *names: str, weights: Mapping[str, float] | None = None
    ) -> list[dict[str, Any]]:
        return [
            {"path": str(self.data(name)), "name": name, "weight": (weights or {}).get(name, 1.0)}
            for name in names
        ]

    def contributions(self, variant: str = "pairs") -> list[Path]:
        return [self.path / variant / name for name in self.spec.domains]

    @property
    def active(self) -> int:
        """Experts that a token uses in jointly trained mixtures: as many as a merge's default."""
        return min(4, len(self.spec.domains) + 1)

    def train_anchor(self, out: Path) -> None:
        pretrain(
            self.spec.run(
                "anchor",
                {"model": self.spec.model, **self.spec.anchor},
                self.records("public"),
                self.seed,
            ),
            out,
        )

    def publish_anchor(self) -> None:
        public = [self.root / "text" / f"{name}.jsonl" for name in self.spec.public]
        publish(
            self.path / "anchor-run", public, self.path / "anchor", dtype=self.spec.release_dtype
        )

    def continued(self, domain: str) -> RunConfig:
        """The anchor, all weights of which are trained further: on a domain an individual model, on
        public text the control."""
        start = {"train.init": str(self.path / "anchor")}
        return self.spec.run("anchor", self.spec.dense, self.records(domain), self.seed, **start)

    def pair(self, domain: str, overrides: Mapping[str, Any]) -> RunConfig:
        names = {
            "pair.anchor": str(self.path / "anchor"),
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
        public, private = (
            [self.root / "text" / f"{name}.jsonl" for name in self.spec.public],
            self.root / "text" / f"{domain}.jsonl",
        )
        out = self.path / f"proxies-{domain}.jsonl"
        remove_file(out)  # of a start that was killed before it could tell how well it chose
        chosen = select_proxies(
            self.path / "anchor",
            [private],
            public,
            out,
            share=self.spec.proxy_share,
            diversity=self.spec.proxy_diversity,
        )
        write_json(self.path / f"proxies-{domain}.json", chosen._asdict() | {"share": chosen.share})

    def tune_router(self, merged: str = "merged", tuned: str = "tuned") -> None:
        proxies = {domain: self.path / f"proxies-{domain}.jsonl" for domain in self.spec.domains}
        config = self.path / f"{tuned}.yaml"
        write_text(
            config,
            json.dumps(
                {
                    **self.spec.router,
                    "data": {**self.spec.router.get("data", {}), "seq_len": self.spec.seq_len},
                }
            ),
        )
        seed = [f"train.seed={self.seed}"]
        tune(
            self.path / merged,
            proxies,
            [self.data("public")],
            self.path / tuned,
            settings=Settings(config, seed),
        )

    def joint(self, times: int) -> RunConfig:
        """All data pooled, as the pairs saw them together; as many FLOPs as all pairs together
        took, `times` over."""
        start, anchor = (
            open_artifact(self.path / name).config for name in ("joint-start", "anchor")
        )
        run, report = self.joint_of(times, anchor, start)
        write_json(self.path / f"flops-{times}x.json", report)
        return run

    def joint_of(
        self, times: int, anchor: ModelConfig, mixture: ModelConfig
    ) -> tuple[RunConfig, dict[str, float]]:
        """The run, and what it and the pairs take."""
        pairs = [self.pair(domain, {}) for domain in self.spec.domains]
        spent = times * sum(pair.train.steps * step_flops(pair, anchor).model for pair in pairs)
        assert pairs[0].pair is not None
        share = pairs[0].pair.public_share
        weights = dict.fromkeys(self.spec.domains, (1 - share) / len(pairs)) | (
            {"public": share} if share else {}
        )
        init = {"train.init": str(self.path / "joint-start")}
        run = self.spec.run(
            "joint", self.spec.joint, self.records(*weights, weights=weights), self.seed, **init
        )
        run = dataclasses.replace(run, model=mixture)
        run = dataclasses.replace(
            run, train=dataclasses.replace(run.train, steps=steps_of_flops(spent, run))
        )
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
        """Token ids of what the extraction attack tries to extract: documents of the first private
        domain that its owner trained on."""
        domain, spec = self.spec.domains[0], self.spec
        texts = read_training_documents(self.root / "text" / f"{domain}.jsonl")
        tokenizer = open_artifact(self.path / "anchor").tokenizer
        return sample_documents(
            texts,
            tokenizer,
            spec.extraction_documents,
            spec.extraction_prefix,
            spec.extraction_tokens,
        )

    def train_overfit(self, out: Path) -> None:
        """The anchor, trained on nothing but these documents, over and over: what a successful
        attack looks like."""
        tokenizer = open_artifact(self.path / "anchor").tokenizer
        text, data = self.path / "attacked.jsonl", self.path / "attacked-data"
        if not data.exists():
            write_text(
                text,
                "".join(
                    json.dumps({"text": tokenizer.decode(ids)}) + "\n"
                    for ids in self.attacked_documents()
                ),
            )
            prepare([text], tokenizer, self.spec.seq_len, data, heldout=0)
        start = {"train.init": str(self.path / "anchor")}
        pretrain(
            self.spec.run("anchor", self.spec.overfit, [{"path": str(data)}], self.seed, **start),
            out,
        )

    def pairs_of_domains(self) -> list[tuple[str, str]]:
        return list(itertools.permutations(self.spec.domains, 2))


def write_json(path: Path, value: Any) -> None:
    make_folder(path.parent)
    write_text(path, json.dumps(value, indent=1) + "\n")
