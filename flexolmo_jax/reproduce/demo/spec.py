"""What a demo is, and where it keeps things. It is one YAML: see smollm2.yaml."""

import dataclasses
import importlib.resources
from pathlib import Path

from flexolmo_jax.config import build
from flexolmo_jax.errors import UserError
from flexolmo_jax.plain_yaml import parse_yaml

NAMES = ("smollm2",)  # each a file of this folder
CONTROL = "control"  # an expert that nobody owns, trained on public text alone


@dataclasses.dataclass(frozen=True)
class Demo:
    """Its domains are private: each has an owner, who trains an expert on it. The last leaves."""

    anchor: str = ""  # a name of `flexolmo anchor fetch`
    domains: tuple[str, ...] = ()  # the first whose text can be had
    owners: int = 4  # how many
    active: int = 2  # experts that a token uses in the merged model
    public: str = "public"  # a domain of `flexolmo data fetch`
    max_mb: float = 2.0  # of text of each
    seq_len: int = 512
    records: int = 8  # held-out records of each domain that are scored
    prompt: int = 48  # tokens of a held-out document that a sample begins with
    answer: int = 64  # tokens of a sample
    workers: int = 2  # commands at a time
    pair: dict = dataclasses.field(default_factory=dict)  # a pair's config

    @property
    def leaver(self) -> str:
        """The owner who leaves."""
        return self.domains[-1]

    @property
    def columns(self) -> tuple[str, ...]:
        """What models are scored on."""
        return ("public", *self.domains)


def with_text(spec: Demo, places: "Places") -> Demo:
    """The demo of domains whose text was fetched. Raises UserError where fewer than two were."""
    had = [domain for domain in spec.domains if places.documents(domain).exists()]
    if len(had) < 2:
        raise UserError(
            f"of {', '.join(spec.domains)} text of {', '.join(had) or 'none'} could be had;"
            f" expected two domains or more; see {places.root / 'logs' / 'text.log'}"
        )
    return dataclasses.replace(spec, domains=tuple(had[: spec.owners]))


class Places:
    """Where a demo keeps what it makes."""

    def __init__(self, root: Path):
        self.root = root
        self.spec, self.commands, self.pair = (
            root / "demo.yaml",
            root / "commands.sh",
            root / "pair.yaml",
        )
        self.anchor, self.keys, self.merged = root / "anchor", root / "keys", root / "merged"
        self.results, self.report = root / "results.json", root / "report.html"

    def documents(self, domain: str) -> Path:
        return self.root / "text" / f"{domain}.jsonl"

    def contribution(self, name: str) -> Path:
        return self.root / "contributions" / name

    def run(self, name: str) -> Path:
        """A pair's run, which stays with its owner."""
        return self.root / "contributions" / f"{name}.work" / "run"

    def data(self, column: str) -> Path:
        """Records: the anchor's public ones, or an owner's."""
        if column == "public":
            return self.anchor / "public"
        return self.root / "contributions" / f"{column}.work" / "data"

    def without(self, name: str) -> Path:
        """The merged model that an owner has left."""
        return self.root / f"merged-{name}"

    def never(self, name: str) -> Path:
        """A merge that an owner never was in."""
        return self.root / f"never-{name}"

    def scores(self, line: str) -> Path:
        return self.root / "scores" / f"{line}.json"


def read_demo(name: str) -> str:
    """The YAML of a demo. Raises UserError for an unknown name."""
    if name not in NAMES:
        raise UserError(f"got {name!r:.80}; expected one of {', '.join(NAMES)}")
    file = importlib.resources.files("flexolmo_jax.reproduce.demo").joinpath(f"{name}.yaml")
    return file.read_text(encoding="utf-8")


def parse_demo(content: str) -> Demo:
    return build(Demo, parse_yaml(content.encode()))
