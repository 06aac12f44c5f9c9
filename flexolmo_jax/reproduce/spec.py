"""What a study is: its domains, sizes, seeds and runs. It is one YAML; see configs/reproduce/."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.config import RunConfig, build, resolve
from flexolmo_jax.errors import UserError
from flexolmo_jax.plain_yaml import read_yaml


@dataclasses.dataclass(frozen=True)
class Spec:
    """A study. Its sections for runs are those of a run's YAML.

    They leave out what the study fills in: paths, names, seeds. A section that is not there leaves
    its models out: `joint`, `btx`, `router`, `overfit`.
    """

    title: str = ""
    domains: tuple[str, ...] = ()  # private; each trains an expert
    public: tuple[str, ...] = ("public",)
    max_mb: float = 12.0  # of text of each
    vocab_size: int = 4096
    seq_len: int = 256
    seeds: int = 3  # of all models but ablations, which have the first only
    workers: int = 1  # cells that run at a time, each a process
    heldout_records: int = 64  # that are scored, of each domain
    mixed_documents: int = 4  # of each ordered pair of private domains
    score_batch: int = 16  # records at a time
    proxy_share: float = 0.02  # of the public documents
    proxy_diversity: int = 4
    release_dtype: str = "float32"
    # a name of `flexolmo anchor fetch`, in place of an anchor that the study trains and releases
    open_anchor: str = ""
    model: dict = dataclasses.field(default_factory=dict)
    anchor: dict = dataclasses.field(default_factory=dict)
    pair: dict = dataclasses.field(default_factory=dict)
    # individual models, and the control on public text
    dense: dict = dataclasses.field(default_factory=dict)
    joint: dict = dataclasses.field(default_factory=dict)
    btx: dict = dataclasses.field(default_factory=dict)
    router: dict = dataclasses.field(default_factory=dict)
    # the extraction attack's control: the anchor on the attacked documents alone
    overfit: dict = dataclasses.field(default_factory=dict)
    extraction_documents: int = 32  # of the first private domain
    extraction_prefix: int = 32  # tokens of each that are given
    extraction_tokens: int = 96  # tokens that are sampled
    # name -> overrides of the pairs, as {"pair.contrast": 0}
    ablations: dict = dataclasses.field(default_factory=dict)
    tuned_ablations: tuple[str, ...] = ()  # those whose router is tuned too

    def check(self) -> None:
        are_different = len({*self.domains, *self.public}) == len(self.domains) + len(self.public)
        if len(self.domains) < 2 or not self.public or not are_different:
            raise UserError(
                f"domains are {', '.join(self.domains) or 'none'} and public"
                f" {', '.join(self.public) or 'none'}; expected two or more private domains and a"
                " public one, all different"
            )
        for what, names in (
            ("domains and public", [*self.domains, *self.public]),
            ("ablations", list(map(str, self.ablations))),
        ):  # folders and files have these names
            folded = [name.casefold() for name in names]
            if alike := [name for name in names if folded.count(name.casefold()) > 1]:
                raise UserError(
                    f"{what} have {' and '.join(map(repr, alike))}, one name where capitals make no"
                    " difference; give each a name of its own"
                )
        for name in (
            "seeds",
            "workers",
            "heldout_records",
            "mixed_documents",
            "score_batch",
            "proxy_diversity",
            "extraction_documents",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("model", "anchor") if self.open_anchor else ():
            if getattr(self, name):
                raise UserError(f"{name} has no effect beside open_anchor; remove one of them")
        if self.tuned_ablations and not self.router:
            raise UserError("tuned_ablations needs the section router; add it, or leave them out")
        if unknown := set(self.tuned_ablations) - set(self.ablations):
            raise UserError(
                f"tuned_ablations has {', '.join(sorted(unknown))}; expected some of"
                f" {', '.join(self.ablations) or 'no ablations'}"
            )

    def run(
        self,
        kind: str,
        section: Mapping[str, Any],
        train: Sequence[Mapping[str, Any]],
        seed: int,
        **overrides: Any,
    ) -> RunConfig:
        """A run of the study on these sources, from a section.

        overrides: by the config's key, as `pair.contrast`.
        """
        tree = {"run": kind, **section}
        tree["data"] = {**section.get("data", {}), "train": list(train), "seq_len": self.seq_len}
        tree["train"] = {**section.get("train", {}), "seed": seed}
        return resolve(tree, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])


def load_spec(path: Path) -> Spec:
    """Raises UserError for a file that is no study."""
    spec = build(Spec, read_yaml(path))
    spec.check()
    return spec
