"""What an owner hands over: the expert's tensors and a manifest, in a directory with nothing else in it. Never data.

    expert.safetensors   layers.<l>.ffn.{gate,up,down}  layers.<l>.router.row  layers.<l>.router.bias (where trained with one)
    manifest.json        canonical JSON: owner, name, anchor fingerprint, model config, digests, training summary, ...
    manifest.sig         optional: an Ed25519 signature over the manifest's bytes

docs/contribution-format.md is the specification. Checking one reads the manifest first: another anchor, an untrusted key or an expired
licence is refused before any tensor is touched. The manifest has the digest of every tensor, of the header before them and, in its last
key, of itself: a byte that changed on the way is found wherever it is.
"""

import datetime
import hashlib
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.artifact import Artifact, canonical_json
from flexolmo_jax.config import ModelConfig, build
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import children, in_bucket, open_regular, path_of, reason
from flexolmo_jax.storage.tensorfile import TensorFile
from flexolmo_jax.storage.untrusted import parse_json

from .signature import ANY, Trust, check_signature

FORMAT = 1
TENSORS, MANIFEST, SIGNATURE = "expert.safetensors", "manifest.json", "manifest.sig"
MANIFEST_LIMIT = 1 << 26  # bytes
MATRICES = ("gate", "up", "down")
OF_MERGES = ("n_experts", "n_active", "router_bias")  # keys of a model's config that a merge decides
MANIFEST_TYPES: dict[str, Any] = {
    **dict.fromkeys(("name", "owner", "domain", "licence", "anchor", "dtype", "header", "tool", "sha256"), str),
    **dict.fromkeys(("model", "tensors", "training"), dict),
    "expires": str | None,
    "privacy": str | dict,
    "router_bias": bool,
}


@dataclass(frozen=True)
class Contribution:
    """A contribution whose manifest has been read; `check` decides on it, `tensors` reads and checks the rest."""

    path: Path
    manifest: dict[str, Any]
    text: bytes  # of the manifest
    signature: bytes | None

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["anchor"]

    @property
    def has_bias(self) -> bool:
        return self.manifest["router_bias"]

    def check(self, anchor: Artifact | None = None, trust: Trust = ANY) -> dict[str, Any] | None:
        """Whether it may be used (with this anchor, or a model that stands on it), by its manifest alone; returns who signed it.

        Raises UserError for one made from another anchor, a signature that is wrong or missing by the policy, and an expired licence.
        """
        if anchor is not None and self.fingerprint != anchor.fingerprint:
            raise UserError(
                f"{self.path} was made from the anchor {self.fingerprint[:16]}; {anchor.path} is {str(anchor.fingerprint)[:16]}; "
                "experts only fit the anchor they were trained against"
            )
        if anchor is not None:
            ours, theirs = ({**model, **dict.fromkeys(OF_MERGES, 0)} for model in (self.manifest["model"], anchor.description["model"]))
            for key, same in (("model", ours == theirs), ("dtype", self.manifest["dtype"] == anchor.dtype)):
                if not same:
                    raise UserError(f"{self.path} names the fingerprint of {anchor.path} but has another {key}; ask its owner for it again")
        signer = check_signature(self.text, self.signature, trust, self.path)
        expires, today = self.manifest["expires"], datetime.datetime.now(datetime.UTC).date().isoformat()
        if expires is not None and expires < today:
            raise UserError(f"the licence of {self.path} expired on {expires}; ask its owner for a new one")
        return signer

    def tensors(
        self, into: Callable[[str], np.ndarray | None] = lambda name: None, order: Sequence[str] | None = None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Each tensor by name, checked; one at a time is in memory. `into` may give bytes to read one into.

        They come in the order of the file, or in this `order`.

        Raises UserError naming the first tensor that is missing, unknown, of another shape or dtype, not finite, or whose bytes
        are not those of the manifest.
        """
        path, declared = self.path / TENSORS, self.manifest["tensors"]
        with TensorFile(path) as file:
            for kind, names in (
                ("misses", declared.keys() - file.entries.keys()),
                ("holds unknown", file.entries.keys() - declared.keys()),
            ):
                if names:
                    shown = ", ".join(sorted(names)[:3])[:200]
                    raise UserError(f"{path} {kind} tensors: {shown!r}; ask its owner for a whole contribution")
            for name, entry in file.entries.items():
                got, expected = (str(entry.dtype), list(entry.shape)), (declared[name]["dtype"], declared[name]["shape"])
                if got != expected:
                    raise UserError(f"{path}: {name} is {got[0]} {got[1]}; expected {expected[0]} {expected[1]}")
            if file.header_sha256 != self.manifest["header"]:
                raise UserError(f"{path} does not have the header of the manifest (its SHA-256 differs); ask its owner for it again")
            for name in order or file.entries:
                tensor, digest, finite = file.read(name, into(name))
                if digest != declared[name]["sha256"]:
                    raise UserError(f"{path}: the bytes of {name} are not those of the manifest; ask its owner for the contribution again")
                if not finite:
                    raise UserError(f"{path}: {name} has values that are not finite; the expert is broken")
                yield name, tensor


def tensor_shapes(config: ModelConfig, has_bias: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of a contribution to an anchor of this architecture."""
    D, F = config.d_model, config.d_ffn
    per_layer = {"ffn.gate": (D, F), "ffn.up": (D, F), "ffn.down": (F, D), "router.row": (D,)} | ({"router.bias": ()} if has_bias else {})
    return {f"layers.{layer}.{name}": shape for layer in range(config.n_layers) for name, shape in per_layer.items()}


def leaf_of(name: str) -> tuple[str, int]:
    """Where a tensor of a contribution goes in a model: ("experts/gate", 3) for "layers.3.ffn.gate"."""
    _, layer, _, leaf = name.split(".")
    return f"experts/{leaf}", int(layer)


def name_of_tensor(leaf: str, layer: int) -> str:
    """The inverse of `leaf_of`."""
    leaf = leaf.removeprefix("experts/")
    return f"layers.{layer}.{'ffn' if leaf in MATRICES else 'router'}.{leaf}"


def open_contribution(path: Path) -> Contribution:
    """Reads the manifest and the signature. Raises UserError for anything else than a contribution with nothing else in it."""
    path = path_of(path)
    try:
        names = {child.name for child in children(path)}
    except OSError as error:
        raise UserError(f"{path} is not a contribution: {reason(error)}; expected a directory with a {MANIFEST}") from None
    if MANIFEST not in names:
        raise UserError(f"{path} is not a contribution: it has no {MANIFEST}")
    if unknown := names - {TENSORS, MANIFEST, SIGNATURE}:
        found = ", ".join(repr(name) for name in sorted(unknown)[:3])
        raise UserError(f"{path} holds {found}; a contribution is {TENSORS}, {MANIFEST} and perhaps {SIGNATURE}, and nothing else")
    for name in names:
        if not in_bucket(path) and not stat.S_ISREG((path / name).lstat().st_mode):
            raise UserError(f"{path / name} is not a regular file; a contribution has no links and no folders in it")
    text = _read(path / MANIFEST)
    try:
        manifest = _checked_manifest(text)
    except UserError as error:
        raise UserError(f"{path / MANIFEST}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path / MANIFEST} is damaged ({type(error).__name__}: {error!s:.100}); ask its owner for it again") from None
    return Contribution(path, manifest, text, _read(path / SIGNATURE) if SIGNATURE in names else None)


def check_expert_name(name: str) -> None:
    """Names become parts of paths and of command lines. Raises UserError for one that cannot."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name) or name == "anchor":
        raise UserError(f"the expert's name is {name!r}; expected up to 64 letters, digits, and _ . - inside, and not 'anchor'")


def sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest's file: canonical JSON with the digest of everything else in it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return (canonical_json(rest | {"sha256": hashlib.sha256(canonical_json(rest).encode()).hexdigest()}) + "\n").encode()


def _read(path: Path) -> bytes:
    with open_regular(path) as file:
        text = file.read(MANIFEST_LIMIT + 1)
    if len(text) > MANIFEST_LIMIT:
        raise UserError(f"{path} has more than {MANIFEST_LIMIT} bytes; that is none")
    return text


def _checked_manifest(text: bytes) -> dict[str, Any]:
    """The manifest in a file. Raises ValueError, KeyError, TypeError, RecursionError or UserError where it is none, whoever wrote it."""
    manifest = parse_json(text)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise UserError(f"the format is {found!r:.40}; this version reads {FORMAT}")
    for key, kind in MANIFEST_TYPES.items():
        value = manifest[key]
        if not isinstance(value, kind) or (isinstance(value, str) and not value.isprintable()):
            raise ValueError(f"{key} is {value!r:.40}; expected a {getattr(kind, '__name__', kind)}")
    if unknown := manifest.keys() - MANIFEST_TYPES.keys() - {"format"}:
        raise ValueError(f"unknown keys {sorted(unknown)[:3]}")
    if text != sealed(manifest):
        raise ValueError("its bytes are not those that its own digest was taken of")
    check_expert_name(manifest["name"])
    if manifest["expires"] is not None:
        datetime.datetime.strptime(manifest["expires"], "%Y-%m-%d")
    _check_privacy(manifest["privacy"])
    config, declared = build(ModelConfig, manifest["model"]), manifest["tensors"]
    config.check()
    if len(declared) != (5 if manifest["router_bias"] else 4) * config.n_layers:
        raise ValueError(f"{len(declared)} tensors for {config.n_layers} layers")
    for name, shape in tensor_shapes(config, manifest["router_bias"]).items():
        got = declared[name]["dtype"], declared[name]["shape"]
        if got != (manifest["dtype"], list(shape)):
            raise ValueError(f"{name} is {got}; expected {manifest['dtype']} {list(shape)}")
        if not re.fullmatch("[0-9a-f]{64}", declared[name]["sha256"]):
            raise ValueError(f"{name} has no SHA-256")
    return manifest


def _check_privacy(statement: Any) -> None:
    if isinstance(statement, dict):
        numbers = [statement["epsilon"], statement["delta"]]
        if len(statement) != 2 or not all(isinstance(n, float | int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise ValueError(f"privacy is {statement!r:.80}")
    elif statement != "none":
        raise ValueError(f"privacy is {statement!r:.40}; expected 'none', or epsilon and delta")
