"""A contribution, what an owner hands over: the expert's tensors and a manifest. Never data.

    expert.safetensors   layers.<l>.ffn.{gate,up,down}, layers.<l>.router.row and, where trained
                         with one, layers.<l>.router.bias
    manifest.json        canonical JSON: owner, name, anchor fingerprint, model config, digests,
                         training summary, ... (manifest.py)
    manifest.sig         optional: an Ed25519 signature over the manifest's bytes

docs/contribution-format.md is the specification. The manifest is read first: another anchor, an
untrusted key or an expired licence is refused before any tensor is read. The manifest has the
digest of every tensor, of the header of their file and, in its last key, of itself. So every byte
that changed on the way is found.
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

from flexolmo_jax.artifact import Artifact
from flexolmo_jax.config import ModelConfig, build
from flexolmo_jax.description import canonical_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.integrity import OF_MERGES
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.storage.paths import children, in_bucket, is_clutter, path_of, reason
from flexolmo_jax.storage.tensorfile import TensorFile
from flexolmo_jax.storage.untrusted import conform, parse_json, read_bytes

from .manifest import FORMAT, SCHEMAS
from .signature import ANY, Signed, Trust, check_signature

TENSORS, MANIFEST, SIGNATURE = "expert.safetensors", "manifest.json", "manifest.sig"
MANIFEST_LIMIT = 1 << 22  # bytes; one of 1,024 layers has 0.8 MB
MANIFEST_SIGNS = 1 << 16  # commas and brackets; one of 1,024 layers has 36,000
SIGNATURE_LIMIT = 1 << 12  # bytes
HEADER_OF_TENSOR = 512  # bytes of the tensor file's header for each tensor; they take 130


@dataclass(frozen=True)
class Contribution:
    """A contribution whose manifest has been read; `check` judges it, `tensors` reads the rest."""

    path: Path
    manifest: dict[str, Any]
    text: bytes  # of the manifest
    signature: bytes | None
    is_kept: bool = False  # whether it is what the merged model at `path` kept of one

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["anchor"]

    @property
    def sequence(self) -> int:
        """Rises with every contribution of an expert; 0 in format 1, which has none."""
        return self.manifest.get("sequence", 0)

    @property
    def has_bias(self) -> bool:
        return self.manifest["router_bias"]

    def check(self, anchor: Artifact | None = None, trust: Trust = ANY) -> dict[str, Any] | None:
        """Checks the manifest and returns who signed it.

        `anchor` may be a model made from it. Raises UserError for a contribution to another anchor,
        a signature that is wrong, missing, or of a key that may not sign it, and an expired
        licence.
        """
        signer = self.check_origin(anchor, trust)
        if (expires := self.expired) is not None:
            raise UserError(
                f"the licence of {self.path} expired on {expires}; ask its owner for a new one"
            )
        return signer

    @property
    def expired(self) -> str | None:
        """The last day of a licence that is over."""
        expires = self.manifest["expires"]
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        return expires if expires is not None and expires < today else None

    def check_origin(
        self, anchor: Artifact | None = None, trust: Trust = ANY
    ) -> dict[str, Any] | None:
        """Checks the manifest as `check` does, but not the licence's last day."""
        if anchor is not None:
            self._check_anchor(anchor)
        expert = Signed(self.name, self.manifest["owner"])
        if not self.is_kept:
            return check_signature(self.text, self.signature, trust, self.path, expert=expert)
        where = f"the contribution {self.name!r} in {self.path}"
        remedy = "merge it again from a signed one"
        return check_signature(
            self.text, self.signature, trust, where, expert=expert, remedy=remedy
        )

    def _check_anchor(self, anchor: Artifact) -> None:
        if self.fingerprint != anchor.fingerprint:
            raise UserError(
                f"{self.path} was made from the anchor {self.fingerprint[:16]}; {anchor.path} is"
                f" {str(anchor.fingerprint)[:16]}; experts only fit the anchor they were trained"
                " against"
            )
        ours, theirs = (
            {**model, **dict.fromkeys(OF_MERGES, 0)}
            for model in (self.manifest["model"], anchor.description["model"])
        )
        is_same = {"model": ours == theirs, "dtype": self.manifest["dtype"] == anchor.dtype}
        for key, same in is_same.items():
            if not same:
                raise UserError(
                    f"{self.path} names the fingerprint of {anchor.path} but has another {key}; ask"
                    " its owner for it again"
                )

    def tensors(
        self,
        into: Callable[[str], np.ndarray | None] = lambda name: None,
        order: Sequence[str] | None = None,
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Each tensor by name, checked; one at a time is in memory.

        Args:
            into: by a tensor's name, memory to read it into, or None for new memory.
            order: the tensors' names in the order to read them (default: that of the file).

        Raises:
            UserError: naming the first tensor that is missing, unknown, of another shape or dtype,
                not finite, or whose bytes are not those of the manifest.
        """
        with self._tensor_file() as file:
            for name in order or file.entries:
                tensor, digest, finite = file.read(name, into(name))
                self._check_tensor(name, digest, finite)
                yield name, tensor

    def check_tensors(self) -> int:
        """Reads and checks every tensor block by block, and returns how many there are.

        Raises UserError as `tensors` does.
        """
        with self._tensor_file() as file:
            for name in file.entries:
                self._check_tensor(name, *file.check(name))
            return len(file.entries)

    def _tensor_file(self) -> TensorFile:
        """The open file of tensors, its header checked."""
        header_limit = HEADER_OF_TENSOR * (1 + len(self.manifest["tensors"]))
        file = TensorFile(self.path / TENSORS, header_limit=header_limit)
        try:
            self._check_header(file)
        except UserError:
            file.close()
            raise
        return file

    def _check_header(self, file: TensorFile) -> None:
        path, declared = self.path / TENSORS, self.manifest["tensors"]
        for kind, names in (
            ("misses", declared.keys() - file.entries.keys()),
            ("holds unknown", file.entries.keys() - declared.keys()),
        ):
            if names:
                shown = ", ".join(sorted(names)[:3])[:200]
                raise UserError(
                    f"{path} {kind} tensors: {shown!r}; ask its owner for a whole contribution"
                )
        for name, entry in file.entries.items():
            got = str(entry.dtype), list(entry.shape)
            expected = declared[name]["dtype"], declared[name]["shape"]
            if got != expected:
                raise UserError(
                    f"{path}: {name} is {got[0]} {got[1]}; expected {expected[0]} {expected[1]}"
                )
        if file.header_sha256 != self.manifest["header"]:
            raise UserError(
                f"{path} does not have the header of the manifest (its SHA-256 differs); ask its"
                " owner for it again"
            )

    def _check_tensor(self, name: str, digest: str, finite: bool) -> None:
        path = self.path / TENSORS
        if digest != self.manifest["tensors"][name]["sha256"]:
            raise UserError(
                f"{path}: the bytes of {name} are not those of the manifest; ask its owner for the"
                " contribution again"
            )
        if not finite:
            raise UserError(f"{path}: {name} has values that are not finite; the expert is broken")


def tensor_shapes(config: ModelConfig, has_bias: bool) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a contribution to an anchor of this architecture, by name."""
    D, F = config.d_model, config.d_ffn
    per_layer: dict[str, tuple[int, ...]] = {
        "ffn.gate": (D, F),
        "ffn.up": (D, F),
        "ffn.down": (F, D),
        "router.row": (D,),
    }
    if has_bias:
        per_layer["router.bias"] = ()
    return {
        f"layers.{layer}.{name}": shape
        for layer in range(config.n_layers)
        for name, shape in per_layer.items()
    }


def open_contribution(path: Path) -> Contribution:
    """Reads the manifest and the signature of a contribution.

    What systems leave in folders, as a Mac's zip does, is not read, and a note names it. Raises
    UserError for anything else, and for a directory with other files in it.
    """
    path = path_of(path)
    names = _names_in(path)
    try:
        text = read_bytes(path / MANIFEST, MANIFEST_LIMIT)
        signature = read_bytes(path / SIGNATURE, SIGNATURE_LIMIT) if SIGNATURE in names else None
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}; expected regular files") from None
    try:
        manifest = read_manifest(text)
    except UserError as error:
        raise UserError(f"{path / MANIFEST}: {error}") from None
    except ValueError as error:
        raise UserError(
            f"{path / MANIFEST} is damaged ({error!s:.300}); ask its owner for it again"
        ) from None
    return Contribution(path, manifest, text, signature)


def _names_in(path: Path) -> set[str]:
    """The names of a contribution's files. Raises UserError as `open_contribution` does."""
    try:
        names = {child.name for child in children(path, clutter=True)}
    except OSError as error:
        raise UserError(
            f"{path} is not a contribution: {reason(error)}; expected a directory with a {MANIFEST}"
        ) from None
    if MANIFEST not in names:
        if not path.exists():
            raise UserError(f"{path} does not exist; expected a contribution")
        raise UserError(f"{path} is not a contribution: it has no {MANIFEST}")
    own = names & {TENSORS, MANIFEST, SIGNATURE}
    if unknown := sorted(name for name in names - own if not is_clutter(name)):
        found = ", ".join(map(repr, unknown[:3]))
        raise UserError(
            f"{path} holds {found}; a contribution is {TENSORS}, {MANIFEST} and perhaps"
            f" {SIGNATURE}, and nothing else"
        )
    if left := sorted(names - own):
        shown = ", ".join(map(repr, left[:3]))
        note(f"{path} holds {shown}, which is no part of the contribution and is not read")
    for name in own:
        if not in_bucket(path) and not stat.S_ISREG((path / name).lstat().st_mode):
            raise UserError(
                f"{path / name} is not a regular file; a contribution has no links and no folders"
                " in it"
            )
    return own


def recorded(path: Path, manifest: dict[str, Any], signature: str | None) -> Contribution:
    """A contribution whose manifest and signature are kept by the merged model at `path`.

    Raises UserError for a damaged manifest.
    """
    text = (canonical_json(manifest) + "\n").encode()
    try:
        checked = read_manifest(text)
    except (UserError, ValueError) as error:
        raise UserError(
            f"{path}: the manifest of {manifest.get('name')!r:.70} is damaged: {error!s:.100}; do"
            " not use it"
        ) from None
    signed = None if signature is None else signature.encode()
    return Contribution(path, checked, text, signed, is_kept=True)


def check_expert_name(name: str) -> None:
    """Raises UserError for a name that cannot be part of a path and of a command line."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name) or name == "anchor":
        raise UserError(
            f"the expert's name is {name!r}; expected up to 64 letters, digits, and _ . - inside,"
            " and not 'anchor'"
        )


def sealed(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest's file: canonical JSON with the digest of the other keys."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(canonical_json(rest).encode()).hexdigest()
    return (canonical_json(rest | {"sha256": digest}) + "\n").encode()


def read_manifest(text: bytes) -> dict[str, Any]:
    """The manifest in these bytes, which anybody may have written.

    Raises ValueError or UserError where they are not a manifest.
    """
    manifest = parse_json(text, MANIFEST_SIGNS)
    found = manifest.get("format") if isinstance(manifest, dict) else manifest
    if type(found) is not int or found not in SCHEMAS:
        raise UserError(
            f"the format is {found!r:.40}; this version reads 1 to {FORMAT}; upgrade flexolmo-jax"
            " where it is newer"
        )
    conform(SCHEMAS[found], manifest)
    if text != sealed(manifest):
        raise ValueError("its bytes are not those of its own digest")
    check_expert_name(manifest["name"])
    config, declared = build(ModelConfig, manifest["model"]), manifest["tensors"]
    config.check()
    shapes = tensor_shapes(config, manifest["router_bias"])
    if declared.keys() != shapes.keys():
        raise ValueError(
            f"its {len(declared)} tensors are not the {len(shapes)} of a model of {config.n_layers}"
            " layers"
        )
    for name, shape in shapes.items():
        got = declared[name]["dtype"], declared[name]["shape"]
        if got != (manifest["dtype"], list(shape)):
            raise ValueError(f"{name} is {got}; expected {manifest['dtype']} {list(shape)}")
    return manifest
