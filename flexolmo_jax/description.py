"""`flexolmo.json`, what a run, an anchor or a model says of itself: one schema a kind, and a digest
of all the rest in its last key.

Format 2 (in brackets format 1, which is still read): an anchor's fingerprint covers its sample of
public text (it did not); a model keeps its anchor's parts and every member's manifest and
signature, whole (the anchor's tensors, and some keys of each manifest).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from flexolmo_jax.config import ModelConfig, build
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.files import write_text
from flexolmo_jax.storage.untrusted import JSON_LIMIT, conform, parse_json, read_bytes

DESCRIPTION = "flexolmo.json"
FORMAT = 2
SIGNS = 1 << 19  # commas and brackets in one; 32 experts of 32 layers have 90,000

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")]
Text = Annotated[str, Field(max_length=1000)]
Sketch = Annotated[str, Field(max_length=1 << 20)]  # in base 64, see coordinator/sketch.py
Shape = Annotated[tuple[Annotated[int, Field(ge=1, lt=2**40)], ...], Field(max_length=8)]
Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Tensor:
    dtype: Dtype
    shape: Shape
    sha256: Digest | None = None


@dataclass(frozen=True)
class DigestedTensor:
    dtype: Dtype
    shape: Shape
    sha256: Digest


Tensors = Annotated[dict[Annotated[str, Field(max_length=100)], Tensor], Field(max_length=64)]
DigestedTensors = dict[Annotated[str, Field(max_length=100)], DigestedTensor]


@dataclass(frozen=True)
class _Every:
    format: Annotated[int, Field(ge=1)]
    kind: str
    model: dict[str, Any]  # a ModelConfig, checked as one
    experts: Annotated[tuple[Name, ...], Field(min_length=1, max_length=4096)]
    sha256: Digest


@dataclass(frozen=True)
class Run(_Every):
    run: Literal["anchor", "pair", "router", "joint"]
    tensors: Tensors
    # of a pair and a router run: the path of what it was trained against ...
    base: str | None = None
    fingerprint: Digest | None = None  # ... and the anchor's
    # of a router run: of the description of the model that it was trained on
    base_sha256: Digest | None = None
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class Embedder:
    name: Text
    version: Text
    sha256: Digest


@dataclass(frozen=True)
class Anchor(_Every):
    tensors: DigestedTensors
    tokenizer: Digest
    embedder: Embedder
    public: tuple[Text, ...]
    fingerprint: Digest
    public_sha256: Digest | None = None


@dataclass(frozen=True)
class Parts:
    """What a fingerprint is the digest of. An imported model has nothing but the tensors."""

    tensors: DigestedTensors
    model: dict[str, Any] | None = None
    tokenizer: Digest | None = None
    embedder: Digest | None = None
    public: Digest | None = None


@dataclass(frozen=True)
class Member:
    """An expert that was merged: its contribution's manifest, which has a schema of its own, and
    the signature of that."""

    name: Name
    manifest: dict[str, Any]
    signature: Text | None
    sketch: Sketch


@dataclass(frozen=True)
class FlatMember:
    """An expert of an imported model, or of a model of format 1: nobody can check what is said of
    it, but for its tensors."""

    name: Name
    tensors: DigestedTensors
    owner: Text
    domain: Text
    licence: Text
    expires: Text | None
    router_bias: bool
    privacy: Any
    training: Any
    manifest: Text | None


@dataclass(frozen=True)
class Tuned:
    tuned_with: Annotated[tuple[Text, ...], Field(min_length=1)]  # not with nobody
    tensors: dict[Literal["experts/row", "experts/bias"], Digest]


@dataclass(frozen=True)
class Model(_Every):
    tensors: Tensors
    tokenizer: Digest
    members: tuple[Member | FlatMember, ...]
    fingerprint: Digest | None
    # None: assembled of dense models, which have digests of their own
    anchor: Parts | DigestedTensors | None = None
    imported: Text | None = None
    router: Tuned | None = None
    files: dict[str, Digest] | None = None  # of format 1


SCHEMAS: dict[str, type] = {"run": Run, "anchor": Anchor, "model": Model}


def read_description(path: Path) -> tuple[dict[str, Any], ModelConfig]:
    """The description in a directory, checked by its schema, and its model config. Raises UserError
    for any other."""
    file = path / DESCRIPTION
    try:
        description = read_sealed(file)
        if not isinstance(description.get("format"), int) or description["format"] > FORMAT:
            got = description.get("format")
            raise UserError(
                f"{path} has format {got!r:.20}; this version reads up to {FORMAT}; upgrade"
                " flexolmo-jax"
            )
        if description.get("kind") not in SCHEMAS:
            raise ValueError(
                f"its kind is {description.get('kind')!r:.40}; expected one of {', '.join(SCHEMAS)}"
            )
        conform(SCHEMAS[description["kind"]], description)
        return description, _config_of(description)
    except FileNotFoundError:
        if not path.exists():
            raise UserError(f"{path} does not exist; expected a run, anchor or model") from None
        raise UserError(f"{path} is not a run, anchor or model: it has no {DESCRIPTION}") from None
    except NotADirectoryError:
        raise UserError(
            f"{path} is a file; expected the directory of a run, anchor or model"
        ) from None
    except (ValueError, TypeError, OSError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {error!s:.200}); restore it or make the"
            " artifact anew"
        ) from None


def _config_of(description: Mapping[str, Any]) -> ModelConfig:
    """Raises ValueError where model config, experts, members and tensors do not fit together."""
    if empty := [
        key for key, value in description.items() if value is None and key != "fingerprint"
    ]:
        raise ValueError(f"its {empty[0]} is null; expected none or a value")
    try:
        config = build(ModelConfig, description["model"], "model")
        config.check()
    except UserError as error:
        raise ValueError(str(error)) from None
    experts = description["experts"]
    expected = 2 if description.get("run") == "pair" else config.n_experts
    if len(experts) != expected or len(set(experts)) != len(experts):
        raise ValueError(
            f"it has the experts {', '.join(experts)[:80]}; expected {expected} different ones"
        )
    if description["kind"] == "run":
        return config
    if len({tensor["dtype"] for tensor in description["tensors"].values()}) != 1:
        raise ValueError("its tensors are of several dtypes; expected one")
    if description["kind"] == "anchor" and (config.n_experts != 1 or experts != ["anchor"]):
        raise ValueError(
            f"it is an anchor of {config.n_experts} experts, {experts[0]!r:.40} first; expected"
            " 'anchor' alone"
        )
    if description["kind"] == "model" and "anchor" in description:
        _check_merged(description)
        return config
    if any(tensor.get("sha256") is None for tensor in description["tensors"].values()):
        raise ValueError("a tensor has no SHA-256")
    if description["kind"] == "model" and (
        description["members"] or description["fingerprint"] is not None
    ):
        raise ValueError("it has members or a fingerprint, and no anchor")
    return config


def _check_merged(description: Mapping[str, Any]) -> None:
    """Of a model with an anchor: what belongs together in its format. An imported one has no
    fingerprint, and members without manifests."""
    anchor, members = description["anchor"], description["members"]
    if description["experts"] != ["anchor", *(member["name"] for member in members)]:
        raise ValueError("its experts are not its anchor and its members in their order")
    has_parts = isinstance(anchor.get("tensors"), dict) and "dtype" not in anchor["tensors"]
    if has_parts != (description["format"] > 1):
        raise ValueError(f"its anchor is not described as in format {description['format']}")
    is_merged = description["format"] > 1 and description["fingerprint"] is not None
    if is_merged and not all(anchor.get(key) for key in ("model", "tokenizer", "embedder")):
        raise ValueError("its anchor lacks parts of its fingerprint")
    if any(isinstance(member["manifest"], dict) != is_merged for member in members):
        raise ValueError(
            f"its members {'have no' if is_merged else 'have'} manifests; expected the contrary"
        )


def write_description(directory: Path, description: Mapping[str, Any]) -> None:
    """Writes `flexolmo.json`. Raises ValueError for what could not be read again."""
    sealed = sealed_json({"format": FORMAT, **description})
    if len(sealed) > JSON_LIMIT:
        raise UserError(
            f"the description of {directory} would have {len(sealed)} bytes; expected at most"
            f" {JSON_LIMIT}; merge fewer experts"
        )
    write_text(directory / DESCRIPTION, sealed)


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value that digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def sealed_json(description: Mapping[str, Any]) -> str:
    """A JSON object, readable, with the digest of everything else in it."""
    rest = {key: value for key, value in description.items() if key != "sha256"}
    rest["sha256"] = hashlib.sha256(canonical_json(rest).encode()).hexdigest()
    return json.dumps(rest, indent=1, sort_keys=True) + "\n"


def read_sealed(path: Path) -> dict[str, Any]:
    """What `sealed_json` wrote. Raises OSError, ValueError or UserError."""
    text = read_bytes(path)
    description = parse_json(text, SIGNS)
    if not isinstance(description, dict):
        raise ValueError(f"it is {description!r:.40}; expected an object")
    if text != sealed_json(description).encode():
        raise ValueError("its bytes are not those that its own digest was taken of")
    return description
