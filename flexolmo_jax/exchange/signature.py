"""Signatures: who made a contribution, by Ed25519 over the manifest's exact bytes.

The signature is in `manifest.sig`. The manifest has the digest of every tensor and of their file's
header, so the signature covers all that is handed over. Keys are PEM files, which openssl reads
too: `flexolmo keygen OUT` writes OUT (the private one, PKCS 8) and OUT.pub (SubjectPublicKeyInfo).

A coordinator's directory of public keys says who may sign what. The key FILE.pub may sign experts
called FILE, unless `policy.yaml` says:

    # hospital.pub may sign these, and nothing else
    hospital: {names: [cardiology, oncology], owners: [St. Mary's Hospital]}
    press: {owners: [The Press]}                                                # any name
"""

import base64
import os
import re
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field

from flexolmo_jax.description import canonical_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.plain_yaml import parse_yaml
from flexolmo_jax.storage.files import write_together
from flexolmo_jax.storage.outputs import check_new_file
from flexolmo_jax.storage.paths import (
    absolute,
    children,
    is_apple_double,
    open_regular,
    reason,
    takes_paths,
)
from flexolmo_jax.storage.untrusted import conform, parse_json, read_bytes

ALGORITHM = "ed25519"
PUBLIC = ".pub"
POLICY = "policy.yaml"
KEY_LIMIT = POLICY_LIMIT = 1 << 16  # bytes
# characters that are printable, and nothing is printed: joiners, fillers, selectors of variants
_UNSEEN = re.compile(
    "[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


@dataclass(frozen=True)
class SignatureFile:
    """The keys of `manifest.sig`: the raw key of 32 bytes and the signature of 64, in base 64."""

    algorithm: Literal["ed25519"]
    public_key: Annotated[str, Field(min_length=44, max_length=44)]
    signature: Annotated[str, Field(min_length=88, max_length=88)]


@dataclass(frozen=True)
class Rule:
    """What a key may sign: experts of these names and of these owners; None means any."""

    names: Annotated[list[str], Field(max_length=1000)] | None = None
    owners: Annotated[list[str], Field(max_length=1000)] | None = None

    def lets_in(self, name: str, owner: str) -> bool:
        is_named = self.names is None or name in self.names
        return is_named and (self.owners is None or owner in self.owners)

    def __str__(self) -> str:
        kinds = {"called": self.names, "of the owner": self.owners}
        told = [
            f"{kind} {' or '.join(map(repr, allowed)) or 'nothing'}"
            for kind, allowed in kinds.items()
            if allowed is not None
        ]
        return f"experts {', '.join(told)}" if told else "anything"


@dataclass(frozen=True)
class Policy:
    """The rules of `policy.yaml`, by the name of a key's file without `.pub`."""

    rules: dict[str, Rule]


@dataclass(frozen=True)
class Trust:
    """Which contributions are let in: any, signed ones, or those of listed keys.

    A signature that is there has to be right in every case.
    """

    signed: bool = False
    keys: dict[str, str] | None = None  # public key -> the name of its file
    rules: Mapping[str, Rule] | None = None  # by the name of a key's file; None: there is no policy

    @classmethod
    @takes_paths
    def of(cls, directory: Path | None, signed: bool = False) -> "Trust":
        """The public keys of a directory, `*.pub`, and its policy.

        Raises UserError where there are no keys, a damaged one, a key twice, or a damaged policy.
        """
        if directory is None:
            return cls(signed)
        paths = children(directory, clutter=True)
        paths = [path for path in paths if not is_apple_double(path)]
        keys: dict[str, str] = {}
        for path in paths:
            if path.name.endswith(PUBLIC):
                name, public = path.name.removesuffix(PUBLIC), _encoded(_load_public(path))
                if public in keys:
                    raise UserError(
                        f"{path} is the key of {keys[public]}{PUBLIC} too; keep one, and list what"
                        f" it may sign in {POLICY}"
                    )
                keys[public] = name
            elif (expected := _meant(path.name)) is not None:
                raise UserError(
                    f"{path} is not read; expected {expected}; rename it, or move it elsewhere"
                )
        if not keys and not directory.exists():
            raise UserError(f"{directory} does not exist; expected a directory of public keys")
        if not keys:
            raise UserError(
                f"{directory} holds no public keys; expected files *{PUBLIC} (`flexolmo keygen`"
                " writes them)"
            )
        rules = None
        if POLICY in {path.name for path in paths}:
            rules = _read_policy(directory / POLICY, set(keys.values()))
        return cls(True, keys, rules)

    def check(self, key: str, name: str, owner: str, where: Path | str) -> None:
        """Raises UserError unless a listed key may sign this expert of this owner."""
        assert self.keys is not None
        if self.rules is None:
            others = set(self.keys.values()) - {key}
            is_allowed = name == key and _as_read(owner) not in map(_as_read, others)
            allowed = f"experts called {key!r}, of no owner whom another key is named for"
        else:
            rule = self.rules.get(key)
            is_allowed = rule is not None and rule.lets_in(name, owner)
            allowed = f"nothing, as {POLICY} does not list it" if rule is None else f"{rule!s:.200}"
        if not is_allowed:
            raise UserError(
                f"{where} is the expert {name!r} of the owner {owner!r:.80}, signed by the key"
                f" {key}{PUBLIC}, which may sign {allowed}; if it may sign this one too, say so in"
                f" {POLICY} beside the key"
            )


ANY = Trust()


@takes_paths
def keygen(out: Path) -> str:
    """Writes a new private key, which only its owner can read, and the public key beside it.

    Returns the public key in base 64. Either both files are written or none. Raises UserError where
    one of them exists or cannot be written, and inside an anchor, a contribution or their like.
    """
    check_new_file(out)
    key = Ed25519PrivateKey.generate()
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(
        encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        encoding, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    write_together({out.with_name(out.name + PUBLIC): (public, 0o644), out: (private, 0o600)})
    return _encoded(key.public_key())


@takes_paths
def load_key(path: Path) -> Ed25519PrivateKey:
    """The private key in a file.

    Raises UserError where there is none, and for one that somebody else owns or can read.
    """
    try:
        with open_regular(absolute(path)) as file:
            status, text = os.fstat(file.fileno()), file.read(KEY_LIMIT + 1)
    except OSError as error:
        raise UserError(
            f"cannot read the key {path}: {reason(error)}; expected a regular file"
        ) from None
    try:
        if len(text) > KEY_LIMIT:
            raise ValueError(f"it has more than {KEY_LIMIT} bytes")
        key = serialization.load_pem_private_key(text, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(
            f"{path} is not a private key without a password in PEM; make one with `flexolmo"
            " keygen`"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(
            f"{path} is a key of another kind; expected Ed25519 (`flexolmo keygen` makes one)"
        )
    if status.st_uid != os.geteuid():
        raise UserError(
            f"the key {path} belongs to another user (uid {status.st_uid}), who can read it; make"
            " one of your own"
        )
    if (mode := stat.S_IMODE(status.st_mode)) & 0o077:
        raise UserError(
            f"the key {path} can be read or changed by others (mode {mode:o}); expected 600; run:"
            f" chmod 600 {path}"
        )
    return key


def sign(manifest: bytes, key: Ed25519PrivateKey) -> bytes:
    """A signature over a manifest's bytes: the content of `manifest.sig`."""
    return _spelled(_encoded(key.public_key()), base64.b64encode(key.sign(manifest)).decode())


class Signed(NamedTuple):
    """The expert that a signed manifest is of."""

    name: str
    owner: str


def check_signature(
    content: bytes,
    signature: bytes | None,
    trust: Trust,
    where: Path | str,
    *,
    expert: Signed | None = None,
    remedy: str = "ask its owner to package it with --sign-key",
) -> dict[str, Any] | None:
    """Who signed a file: the public key, and the name it is listed under. None: nobody did.

    Args:
        content: the file's bytes.
        signature: those of its signature, if there is one.
        trust: who may sign.
        where: the file, for messages.
        expert: the expert that a manifest is of; None for other files.
        remedy: what to do where there is no signature.

    Raises:
        UserError: for a wrong signature, and for what `trust` refuses.
    """
    if signature is None:
        if trust.signed:
            raise UserError(f"{where} is not signed; {remedy}")
        return None
    try:
        public, key, signed = _read_signature(signature)
    except ValueError as error:
        raise UserError(
            f"the signature of {where} is damaged ({error!s:.120}); ask its owner for it again"
        ) from None
    if trust.keys is not None and public not in trust.keys:
        listed = ", ".join(sorted(trust.keys.values()))
        raise UserError(
            f"{where} is signed by the key {public}; expected one of the listed ones: {listed}"
        )
    try:
        key.verify(signed, content)
    except InvalidSignature:
        raise UserError(f"the signature of {where} is for other bytes; sign it again") from None
    if trust.keys is None:
        return {"public_key": public}
    if expert is not None:
        trust.check(trust.keys[public], expert.name, expert.owner, where)
    return {"public_key": public, "name": trust.keys[public]}


def named_key(signature: bytes) -> str:
    """The public key that a signature names, in base 64. Nothing is checked."""
    try:
        return _read_signature(signature)[0]
    except ValueError:
        return "damaged"


def _read_signature(file: bytes) -> tuple[str, Ed25519PublicKey, bytes]:
    """The public key in base 64, the key, and the signature.

    Raises ValueError for any spelling but ours.
    """
    fields = parse_json(file)
    conform(SignatureFile, fields)
    public, signed = fields["public_key"], fields["signature"]
    if file != _spelled(public, signed):
        raise ValueError("not the canonical spelling")
    raw_public, raw_signed = (base64.b64decode(text, validate=True) for text in (public, signed))
    if (_base64(raw_public), _base64(raw_signed)) != (public, signed):
        raise ValueError("not canonical base 64")
    return public, Ed25519PublicKey.from_public_bytes(raw_public), raw_signed


def _meant(name: str) -> str | None:
    """What a file beside keys was probably meant to be called, where it would be overlooked."""
    if name.lower().endswith(PUBLIC):
        return name[: -len(PUBLIC)] + PUBLIC
    is_policy = name.lower().lstrip(".").startswith("polic") and name != POLICY
    return POLICY if is_policy else None


def _as_read(name: str) -> str:
    """A name without what a reader overlooks: case, spaces, the encoding of accented letters, and
    what is not seen at all."""
    return "".join(_UNSEEN.sub("", unicodedata.normalize("NFKC", name)).casefold().split())


def _spelled(public: str, signature: str) -> bytes:
    fields = {"algorithm": ALGORITHM, "public_key": public, "signature": signature}
    return (canonical_json(fields) + "\n").encode()


def _read_policy(path: Path, keys: set[str]) -> dict[str, Rule]:
    try:
        rules = parse_yaml(read_bytes(absolute(path), POLICY_LIMIT), strings=True)
        conform(Policy, {"rules": rules})
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a policy: {reason(error):.200}; expected lines such as `key: {{names:"
            " [...], owners: [...]}`"
        ) from None
    if unknown := sorted(rules.keys() - keys):
        raise UserError(
            f"{path} has a rule for {unknown[0]!r:.80}, but there is no such key; expected names of"
            f" {', '.join(sorted(keys))}"
        )
    return {key: Rule(**rule) for key, rule in rules.items()}


def _load_public(path: Path) -> Ed25519PublicKey:
    try:
        text = read_bytes(absolute(path), KEY_LIMIT)
        if text.count(b"-----BEGIN") > 1:
            raise UserError(f"{path} holds several keys; expected one; give each a file of its own")
        key = serialization.load_pem_public_key(text)
    except OSError as error:
        raise UserError(
            f"cannot read the key {path}: {reason(error)}; expected a regular file"
        ) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(
            f"{path} is not a public key in PEM; `flexolmo keygen` writes one"
        ) from None
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(
            f"{path} is a key of another kind; expected Ed25519 (`flexolmo keygen` makes one)"
        )
    return key


def _encoded(key: Ed25519PublicKey) -> str:
    return _base64(key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
