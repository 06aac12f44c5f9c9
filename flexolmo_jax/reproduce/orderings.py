"""The orderings of a study: which model should have fewer bits per byte than which other."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .scores import MIXED
from .spec import Spec

# means over the private domains; over these and public text
PRIVATE, AVERAGE = "private", "average"
Figures = Mapping[str, float]  # bits per byte by column
Lines = Mapping[str, Figures]  # of a study's table, by model

# A variant of the pairs that lacks something -> the claim that this something helps.
ABLATIONS = {
    "without contrast": "public contrast helps",
    "without bias": "the routers' bias helps",
    "random rows": "rows from the domain's embedding help: against random rows",
    "hidden rows": "rows from the domain's embedding help: against the anchor's hidden states",
    "without coordination": "training beside the anchor helps",
}


class Ordering(NamedTuple):
    """A figure is lower than another by a margin, relative to the other, of at least `least`."""

    name: str
    margin: float | None  # None where a figure is missing
    least: float = 0.0

    @property
    def holds(self) -> bool:
        return self.margin is not None and self.margin >= self.least


class _Claim(NamedTuple):
    """An ordering of two lines' figures in one column."""

    name: str
    better: str
    worse: str
    column: str
    least: float = 0.0
    is_of_first_seed: bool = False

    def ordering(self, means: Lines, first: Lines) -> Ordering:
        lines = first if self.is_of_first_seed else means
        if self.better not in lines or self.worse not in lines:
            return Ordering(self.name, None, self.least)
        better, worse = lines[self.better][self.column], lines[self.worse][self.column]
        return Ordering(self.name, 1 - better / worse, self.least)


def orderings(spec: Spec, means: Lines, first: Lines) -> list[Ordering]:
    """The paper's, and what is asked of a reproduction.

    Ablations have one seed: they are compared with the merge of the first seed.
    """
    tuning = _of_tuning(spec) if spec.router else ()
    return [
        *(claim.ordering(means, first) for claim in _of_merging(spec)),
        _one_active_is_worst(spec, means),
        *(claim.ordering(means, first) for claim in tuning),
        *(_opting_out(spec, means, domain) for domain in spec.domains),
    ]


def _of_merging(spec: Spec) -> Iterator[_Claim]:
    yield _Claim("merged beats the anchor on private domains", "merged", "anchor", PRIVATE)
    for variant, claim in ABLATIONS.items():
        if variant in spec.ablations:
            yield _Claim(claim, "merged", variant, AVERAGE, is_of_first_seed=True)
    if spec.router:
        yield _Claim("tuning the router helps", "merged+tuned", "merged", AVERAGE)
    for variant in spec.tuned_ablations:
        claim, tuned = f"tuning the router helps {variant}", f"{variant}+tuned"
        yield _Claim(claim, tuned, variant, AVERAGE, is_of_first_seed=True)
    for claim, worse, column in (
        ("merged beats the uniform soup", "soup", AVERAGE),
        ("merged beats the weighted soup", "weighted soup", AVERAGE),
        ("merged beats BTM on single domains", "BTM:top2", PRIVATE),
        ("merged beats BTM on mixed documents", "BTM:top2", MIXED),
        ("merged beats switching BTM on mixed documents", "BTM:switching", MIXED),
        ("merged beats prompt routing on mixed documents", "prompt routing", MIXED),
    ):
        yield _Claim(claim, "merged", worse, column)
    if spec.btx:
        yield _Claim("merged beats BTX", "merged", "BTX", AVERAGE)
    if spec.joint:
        claim = "merged reaches the joint model of equal FLOPs"
        yield _Claim(claim, "merged", "joint 1x", AVERAGE)
        yield _Claim("the joint model of twice the FLOPs wins", "joint 2x", "merged", AVERAGE)


def _of_tuning(spec: Spec) -> Iterator[_Claim]:
    start, tuned = "merged and tuned", "merged+tuned"
    private = "on private domains"
    yield _Claim(f"{start} beats the anchor by 20 % {private}", tuned, "anchor", PRIVATE, 0.20)
    claim = f"{start} beats anchor+public by 15 % {private}"
    yield _Claim(claim, tuned, "anchor+public", PRIVATE, 0.15)
    claim = f"{start} is at most 1 % worse on public text"
    yield _Claim(claim, tuned, "anchor", "public", -0.01)
    for domain in spec.domains:
        yield _Claim(f"{start} beats the uniform soup on {domain}", tuned, "soup", domain)
    for worse in ("soup", "weighted soup", "BTM:top2"):
        yield _Claim(f"{start} beats {worse} on mixed documents", tuned, worse, MIXED)


def _one_active_is_worst(spec: Spec, means: Lines) -> Ordering:
    others = ("merged", *(f"merged:k={k}" for k in range(2, len(spec.domains) + 1)))
    figures = [means[name][AVERAGE] for name in others]
    one = means["merged:k=1"][AVERAGE]
    margin = abs(one / min(figures) - 1)
    return Ordering("one active expert is worst", margin if one >= max(figures) else -margin)


def _opting_out(spec: Spec, means: Lines, domain: str) -> Ordering:
    """A domain opts out by its expert's removal; this should cost the domain and nobody else."""

    def change(column: str) -> float:
        return means[f"merged-{domain}"][column] / means["merged"][column] - 1

    moved = max(abs(change(name)) for name in ("public", *spec.domains) if name != domain)
    return Ordering(
        f"opting {domain} out takes its own domain most: how much more than any other",
        change(domain) - moved,
    )
