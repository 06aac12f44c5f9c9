"""Who made a contribution: an Ed25519 signature over the manifest's exact bytes, in `manifest.sig`.

The manifest has the digest of every tensor and of the tensors' header, so that the signature covers all that is handed over. Keys are
PEM files: `flexolmo keygen OUT` writes OUT (the private one, PKCS 8) and OUT.pub (SubjectPublicKeyInfo), which openssl reads too.
"""

import base64
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from flexolmo_jax.description import canonical_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.paths import children
from flexolmo_jax.storage.untrusted import parse_json

ALGORITHM = "ed25519"
PUBLIC = ".pub"


@dataclass(frozen=True)
class Trust:
    """Which contributions are let in: any (a signature that is there must still be right), signed ones, or those of listed keys."""

    signed: bool = False
    keys: dict[str, str] | None = None  # public key -> the name of its file

    @classmethod
    def of(cls, directory: Path | None, signed: bool = False) -> "Trust":
        """The policy of a directory of public keys, `*.pub`. Raises UserError where it has none, or something that is no key."""
        if directory is None:
            return cls(signed)
        paths = [path for path in children(directory) if path.name.endswith(PUBLIC)]
        if not paths:
            raise UserError(f"{directory} holds no public keys; expected files *{PUBLIC} (`flexolmo keygen` writes them)")
        return cls(True, {_encoded(_load_public(path)): path.stem for path in paths})


ANY = Trust()


def keygen(out: Path) -> str:
    """Writes a new private key, readable by its owner only, and the public one beside it; returns the public key in base 64."""
    public = out.with_name(out.name + PUBLIC)
    for path in (out, public):
        if path.exists() or path.is_symlink():
            raise UserError(f"{path} exists; a key is never overwritten: give another name")
    key = Ed25519PrivateKey.generate()
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    out.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(private)
    public.write_bytes(key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo))
    return _encoded(key.public_key())


def load_key(path: Path) -> Ed25519PrivateKey:
    """A private key. Raises UserError where there is none."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise UserError(f"cannot read the key {path}: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(f"{path} is not a private key without a password in PEM; make one with `flexolmo keygen`") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{path} is a key of another kind; expected Ed25519 (`flexolmo keygen` makes one)")
    return key


def sign(manifest: bytes, key: Ed25519PrivateKey) -> bytes:
    """The content of `manifest.sig`."""
    return _spelled(_encoded(key.public_key()), base64.b64encode(key.sign(manifest)).decode())


def check_signature(manifest: bytes, signature: bytes | None, trust: Trust, where: Path) -> dict[str, Any] | None:
    """Who signed: the public key, and the name it is listed under. Raises UserError for what the policy does not let in."""
    if signature is None:
        if trust.signed:
            raise UserError(f"{where} is not signed; ask its owner to package it with --sign-key")
        return None
    try:
        fields = parse_json(signature)
        public, signed = fields["public_key"], fields["signature"]
        if signature != _spelled(public, signed):
            raise ValueError("not the canonical spelling")
        raw_public, raw_signed = (base64.b64decode(text, validate=True) for text in (public, signed))
        if (_base64(raw_public), _base64(raw_signed)) != (public, signed):
            raise ValueError("not canonical base 64")
        key = Ed25519PublicKey.from_public_bytes(raw_public)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"the signature of {where} is damaged ({type(error).__name__}: {error!s:.60}); ask its owner for it again"
        ) from None
    if trust.keys is not None and public not in trust.keys:
        listed = ", ".join(sorted(trust.keys.values()))
        raise UserError(f"{where} is signed by the key {public}; expected one of the listed ones: {listed}")
    try:
        key.verify(raw_signed, manifest)
    except InvalidSignature:
        raise UserError(
            f"the signature of {where} is not one of its manifest; it was changed, or signed for another contribution"
        ) from None
    return {"public_key": public} | ({"name": trust.keys[public]} if trust.keys else {})


def _spelled(public: str, signature: str) -> bytes:
    return (canonical_json({"algorithm": ALGORITHM, "public_key": public, "signature": signature}) + "\n").encode()


def _load_public(path: Path) -> Ed25519PublicKey:
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(f"{path} is not a public key in PEM; `flexolmo keygen` writes one") from None
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"{path} is a key of another kind; expected Ed25519 (`flexolmo keygen` makes one)")
    return key


def _encoded(key: Ed25519PublicKey) -> str:
    return _base64(key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
