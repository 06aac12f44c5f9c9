"""The keys of a manifest: a schema for each version, and which keys were measured.

Format 2 adds `sequence`, which rises with every contribution of an expert. Format 1 is still read;
its sequence counts as 0. docs/contribution-format.md has a table of the keys.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from flexolmo_jax.config import LAYERS, LINE, SEQUENCES, ModelConfig
from flexolmo_jax.errors import UserError
from flexolmo_jax.integrity import manifest_of

FORMAT = 2
MEASURED_BY = (
    "the program that packaged it, on the owner's machine; `flexolmo verify --public` measures"
    " again"
)
STATED_BY = "the owner; not checked"


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected one printable line")
    return text


def day(text: str) -> str:
    if datetime.date.fromisoformat(text).isoformat() != text:
        raise ValueError("expected a date such as 2027-12-31")
    return text


Line = Annotated[str, Field(max_length=LINE), AfterValidator(_printable)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Dtype = Literal["bfloat16", "float32"]
Count = Annotated[int, Field(ge=0, lt=2**63)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Tensor:
    dtype: Dtype
    sha256: Digest
    shape: Annotated[list[Count], Field(max_length=2)]


@dataclass(frozen=True)
class Training:
    """How an expert was trained: keys of a pair's run, or `imported` alone."""

    steps: Count = 0
    tokens: Count = 0
    public_share: Share = 0.0
    # of the anchor and of the pair, by data set
    bits_per_byte: dict[
        Literal["anchor", "pair"], Annotated[dict[Line, NotNegative], Field(max_length=1000)]
    ] = field(default_factory=dict)
    imported: Line = ""


@dataclass(frozen=True)
class Privacy:
    epsilon: NotNegative
    delta: Share


@dataclass(frozen=True)
class Manifest1:
    format: Literal[1, 2]
    name: Line
    owner: Line
    domain: Line
    licence: Line
    expires: Annotated[str, AfterValidator(day)] | None
    anchor: Digest
    model: ModelConfig
    router_bias: bool
    dtype: Dtype
    tensors: Annotated[
        dict[Annotated[str, Field(max_length=40)], Tensor], Field(max_length=5 * LAYERS)
    ]
    header: Digest
    training: Training
    privacy: Literal["none"] | Privacy
    tool: Line
    sha256: Digest


@dataclass(frozen=True)
class Manifest2(Manifest1):
    sequence: Annotated[int, Field(ge=1, le=SEQUENCES)]


SCHEMAS: dict[int, type] = {1: Manifest1, 2: Manifest2}


def told(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest, or a model's part of one, says: the measured keys and the stated ones."""
    stated = ("owner", "domain", "licence", "expires", "sequence", "privacy", "tool")
    return {
        "measured": {"by": MEASURED_BY, **manifest["training"]},
        "stated": {"by": STATED_BY, **{key: manifest[key] for key in stated if key in manifest}},
    }


def check_newer(member: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Raises UserError unless a contribution is a model's member itself, or newer.

    Otherwise whoever kept an old contribution could hand it over again.
    """
    known = manifest_of(member) or {}
    before, now = known.get("sequence", 0), manifest.get("sequence", 0)
    if now <= before and manifest["sha256"] != known.get("sha256"):
        raise UserError(
            f"the contribution of {manifest['name']!r} has sequence {now}; expected more than the"
            f" model's, {before}; ask its owner for the newest one (pair.sequence raises it), or"
            " give --allow-older"
        )
