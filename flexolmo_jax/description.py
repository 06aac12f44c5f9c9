"""`flexolmo.json`: the description of a run, an anchor or a model, with one schema for each kind.

Its key `sha256` is the digest of all the others. The format is 2, and format 1 is still read:

    format  an anchor's fingerprint covers     a model keeps of its anchor and its members
    2       its public text too                the anchor's parts; whole manifests and signatures
    1       all parts but its public text      the anchor's tensors; some keys of each manifest
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from flexolmo_jax.config import LARGEST, ModelConfig, build
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.files import write_text
from flexolmo_jax.storage.untrusted import JSON_LIMIT, conform, parse_json, read_bytes

DESCRIPTION = "flexolmo.json"
FORMAT = 2
# commas and brackets in a description; with 32 experts of 32 layers it has 90,000
SIGNS = 1 << 19

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")]
Text = Annotated[str, Field(max_length=1000)]
Sketch = Annotated[str, Field(max_length=1 << 20)]  # in base 64, see coordinator/sketch.py
Shape = Annotated[tuple[Annotated[int, Field(ge=1, lt=2**40)], ...], Field(max_length=8)]
Dtype = Literal["bfloat16", "float16", "float32"]
# tokens of the records that a model was trained on; earlier versions did not write it
SeqLen = Annotated[int, Field(ge=2, le=LARGEST["max_seq_len"])]


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
class _Common:
    """The keys of every kind."""

    format: Annotated[int, Field(ge=1)]
    kind: str
    model: dict[str, Any]  # a ModelConfig, checked as one
    experts: Annotated[tuple[Name, ...], Field(min_length=1, max_length=4096)]
    sha256: Digest


@dataclass(frozen=True)
class Input:
    """What a run reads beside its base: where it lies, what it holds in words, and its digest."""

    path: str
    holds: Text
    sha256: Digest


@dataclass(frozen=True)
class Continued:
    """A run that was trained on with other settings: from after `step`, these keys changed."""

    step: Annotated[int, Field(ge=1)]
    changed: dict[Text, tuple[Text, Text]]  # what each was, and became


@dataclass(frozen=True)
class Run(_Common):
    run: Literal["anchor", "pair", "router", "joint"]
    tensors: Tensors
    base: str | None = None  # a pair or a router run: path of the anchor or model it trained on
    fingerprint: Digest | None = None  # ... and the anchor's fingerprint
    base_sha256: Digest | None = None  # a router run: digest of that model's description
    data: tuple[str, ...] = ()
    inputs: dict[Text, Input] | None = None  # by the config's key; runs of earlier versions: none
    average: Annotated[int, Field(ge=2, le=1000)] | None = None  # checkpoints: see `train.average`
    lineage: Annotated[tuple[Continued, ...], Field(min_length=1, max_length=1000)] | None = None


@dataclass(frozen=True)
class Embedder:
    name: Text
    version: Text
    sha256: Digest


@dataclass(frozen=True)
class Anchor(_Common):
    tensors: DigestedTensors
    tokenizer: Digest
    embedder: Embedder
    public: tuple[Text, ...]
    fingerprint: Digest
    public_sha256: Digest | None = None
    chat: Digest | None = None
    conventions: Digest | None = None
    seq_len: SeqLen | None = None


@dataclass(frozen=True)
class Parts:
    """What a fingerprint is the digest of. Of an imported model's anchor: only the tensors."""

    tensors: DigestedTensors
    model: dict[str, Any] | None = None
    tokenizer: Digest | None = None
    embedder: Digest | None = None
    public: Digest | None = None
    chat: Digest | None = None
    conventions: Digest | None = None


@dataclass(frozen=True)
class Member:
    """A merged expert, with the manifest of its contribution and the signature of that."""

    name: Name
    manifest: dict[str, Any]  # checked by a schema of its own, in exchange/manifest.py
    signature: Text | None
    sketch: Sketch


@dataclass(frozen=True)
class FlatMember:
    """An expert of an imported model or of format 1. Only what it says of tensors is checked."""

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
    """Router rows and biases that replace those of the members."""

    tuned_with: Annotated[tuple[Text, ...], Field(min_length=1)]
    tensors: dict[Literal["experts/row", "experts/bias"], Digest]


@dataclass(frozen=True)
class Model(_Common):
    tensors: Tensors
    members: tuple[Member | FlatMember, ...]
    fingerprint: Digest | None
    # None: assembled from dense models; then each tensor has its digest in `tensors`
    anchor: Parts | DigestedTensors | None = None
    imported: Text | None = None
    tokenizer: Digest | None = None  # an imported model may have none
    router: Tuned | None = None
    chat: Digest | None = None
    conventions: Digest | None = None
    files: dict[str, Digest] | None = None  # of format 1
    seq_len: SeqLen | None = None  # that of the anchor


SCHEMAS: dict[str, type] = {"run": Run, "anchor": Anchor, "model": Model}


def read_description(path: Path) -> tuple[dict[str, Any], ModelConfig]:
    """Reads a directory's description, and the model config in it.

    Raises UserError for one that is missing, damaged, contradictory, or of a newer format.
    """
    file = path / DESCRIPTION
    try:
        description = read_sealed(file)
        got, kind = description.get("format"), description.get("kind")
        if not isinstance(got, int) or got > FORMAT:
            raise UserError(
                f"{path} has format {got!r:.20}; this version reads up to {FORMAT}; upgrade"
                " flexolmo-jax"
            )
        if kind not in SCHEMAS:
            raise ValueError(f"its kind is {kind!r:.40}; expected one of {', '.join(SCHEMAS)}")
        conform(SCHEMAS[kind], description)
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
            f"{file} is damaged ({type(error).__name__}: {error!s:.200}); restore it or make a new"
            " one"
        ) from None


def _config_of(description: Mapping[str, Any]) -> ModelConfig:
    """The model config. Raises ValueError if experts, members and tensors do not fit it."""
    for key, value in description.items():
        if value is None and key != "fingerprint":
            raise ValueError(f"its {key} is null; expected a value, or no such key")
    try:
        config = build(ModelConfig, description["model"], "model")
        config.check()
    except UserError as error:
        raise ValueError(str(error)) from None
    if description.get("seq_len", 0) > config.max_seq_len:
        raise ValueError(
            f"its seq_len is {description['seq_len']}; expected at most {config.max_seq_len}, which"
            " its model reads"
        )
    experts = description["experts"]
    expected = 2 if description.get("run") == "pair" else config.n_experts
    if len(experts) != expected or len(set(experts)) != len(experts):
        raise ValueError(
            f"it has the experts {', '.join(experts)[:80]}; expected {expected} different ones"
        )
    if description["kind"] != "run":
        _check_published(description, config)
    return config


def _check_published(description: Mapping[str, Any], config: ModelConfig) -> None:
    experts, kind = description["experts"], description["kind"]
    if len({tensor["dtype"] for tensor in description["tensors"].values()}) != 1:
        raise ValueError("its tensors are of several dtypes; expected one")
    if kind == "anchor" and (config.n_experts != 1 or experts != ["anchor"]):
        raise ValueError(
            f"it is an anchor with {config.n_experts} experts, {experts[0]!r:.40} first; expected"
            " one, 'anchor'"
        )
    if kind == "model" and "anchor" in description:
        _check_merged(description)
        return
    if any(tensor.get("sha256") is None for tensor in description["tensors"].values()):
        raise ValueError("a tensor has no SHA-256")
    if kind == "model" and (description["members"] or description["fingerprint"] is not None):
        raise ValueError("it has members or a fingerprint, but no anchor")


def _check_merged(description: Mapping[str, Any]) -> None:
    """Raises ValueError if a model's anchor and members do not fit each other or its format.

    An imported model has no fingerprint, and its members have no manifests.
    """
    anchor, members = description["anchor"], description["members"]
    if description["experts"] != ["anchor", *(member["name"] for member in members)]:
        raise ValueError("its experts are not its anchor and its members, in their order")
    has_parts = isinstance(anchor.get("tensors"), dict) and "dtype" not in anchor["tensors"]
    if has_parts != (description["format"] > 1):
        raise ValueError(f"its anchor is not described as in format {description['format']}")
    is_merged = description["format"] > 1 and description["fingerprint"] is not None
    if is_merged and not all(anchor.get(key) for key in ("model", "tokenizer", "embedder")):
        raise ValueError("its anchor lacks parts of its fingerprint")
    if any(isinstance(member["manifest"], dict) != is_merged for member in members):
        expected = "manifests" if is_merged else "no manifests"
        raise ValueError(f"its members are of the wrong kind; expected members with {expected}")


def write_description(directory: Path, description: Mapping[str, Any]) -> None:
    """Writes `flexolmo.json`. Raises UserError if it would be too long to be read again."""
    sealed = sealed_json({"format": FORMAT, **description})
    if len(sealed) > JSON_LIMIT:
        raise UserError(
            f"the description of {directory} would have {len(sealed)} bytes; expected at most"
            f" {JSON_LIMIT}; merge fewer experts"
        )
    write_text(directory / DESCRIPTION, sealed)


def canonical_json(value: Any) -> str:
    """The JSON text that digests are taken of: each value has exactly one."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def sealed_json(description: Mapping[str, Any]) -> str:
    """A JSON object as indented text, with the digest of all its keys added as `sha256`."""
    rest = {key: value for key, value in description.items() if key != "sha256"}
    rest["sha256"] = hashlib.sha256(canonical_json(rest).encode()).hexdigest()
    return json.dumps(rest, indent=1, sort_keys=True) + "\n"


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads what `sealed_json` wrote. Raises OSError, ValueError or UserError."""
    text = read_bytes(path)
    description = parse_json(text, SIGNS)
    if not isinstance(description, dict):
        raise ValueError(f"it is {description!r:.40}; expected an object")
    if text != sealed_json(description).encode():
        raise ValueError("its bytes do not match its digest")
    return description
