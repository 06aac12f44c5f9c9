"""Signatures: who may hand over what, by real keys."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flexolmo_jax.coordinator.gate import Gate
from flexolmo_jax.coordinator.merge import append, merge, replace
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.contribution import (
    MANIFEST,
    SIGNATURE,
    TENSORS,
    open_contribution,
    sealed,
)
from flexolmo_jax.exchange.signature import Trust, keygen, load_key, sign
from flexolmo_jax.owner.package import package


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """Three owners' keys; `trusted/` holds the public ones of two."""
    directory = tmp_path_factory.mktemp("keys")
    (directory / "trusted").mkdir()
    for name in ("code", "law", "mallory"):
        keygen(directory / name)
        if name != "mallory":
            shutil.copy(directory / f"{name}.pub", directory / "trusted")
    return directory


@pytest.fixture
def signed(pair_runs, contributions, keys, tmp_path) -> Path:
    """What `package --sign-key` writes: the same contribution with a signature."""
    out = Path(shutil.copytree(contributions["code"], tmp_path / "signed"))
    (out / SIGNATURE).write_bytes(sign((out / MANIFEST).read_bytes(), load_key(keys / "code")))
    return out


def test_packaging_with_a_key_signs(pair_runs, contributions, keys, tmp_path):
    out = package(pair_runs["code"], tmp_path / "out", sign_key=keys / "code").path
    assert {p.name for p in out.iterdir()} == {MANIFEST, TENSORS, SIGNATURE}
    assert (out / MANIFEST).read_bytes() == (contributions["code"] / MANIFEST).read_bytes()
    assert verify(out, trust=Trust.of(keys / "trusted"))["signed_by"]["name"] == "code"


def test_a_key_can_be_read_by_its_owner_only_and_is_never_overwritten(keys):
    assert stat.S_IMODE((keys / "code").stat().st_mode) == 0o600
    for name in ("code", "code.pub"):
        with pytest.raises(UserError, match="exists"):
            keygen(keys / name.removesuffix(".pub"))
    (keys / "only.pub").write_text("")
    with pytest.raises(UserError, match="exists"):
        keygen(keys / "only")
    (keys / "only.pub").unlink()
    (keys / "only").symlink_to(keys / "elsewhere")
    with pytest.raises(UserError, match="exists"):
        keygen(keys / "only")
    # theirs stays, ours goes
    assert (keys / "only").is_symlink() and not (keys / "only.pub").exists()
    (keys / "only").unlink()


@pytest.mark.parametrize("operation", ["write", "sync", "link"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_full_disk_leaves_both_keys_or_none(tmp_path, monkeypatch, operation, number):
    """Old code left a private key without its public one, and the name could not be used again."""
    seen = []

    def full(told: str, path: Path) -> None:
        seen.append(told)
        if seen.count(operation) == number and told == operation:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("flexolmo_jax.storage.files.observer", full)
    with pytest.raises(UserError, match=r"No space left on device; nothing was written"):
        keygen(tmp_path / "key")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    keygen(tmp_path / "key")
    load_key(tmp_path / "key")
    assert {path.name for path in tmp_path.iterdir()} == {"key", "key.pub"}


def test_a_private_key_that_others_can_read_or_own_is_refused(tmp_path, monkeypatch):
    keygen(tmp_path / "key")
    for mode in (0o640, 0o604, 0o620, 0o644, 0o610, 0o601, 0o602):
        (tmp_path / "key").chmod(mode)
        with pytest.raises(UserError, match=f"mode {mode:o}.*chmod 600 {tmp_path}/key"):
            load_key(tmp_path / "key")
    (tmp_path / "key").chmod(0o400)
    load_key(tmp_path / "key")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(UserError, match="belongs to another user"):
        load_key(tmp_path / "key")


def test_keys_that_are_no_regular_files_or_too_large_are_refused(keys, tmp_path):
    os.mkfifo(tmp_path / "pipe.pub", 0o600)
    with pytest.raises(UserError, match="expected a regular file"):
        load_key(tmp_path / "pipe.pub")
    with pytest.raises(UserError, match="expected a regular file"):
        Trust.of(tmp_path)
    (tmp_path / "pipe.pub").unlink()
    for name in ("code", "code.pub"):
        large = (keys / name).read_bytes() + b"\n" * 70_000
        (tmp_path / name).write_bytes(large)
        (tmp_path / name).chmod(0o600)
    with pytest.raises(UserError, match="is not a private key"):
        load_key(tmp_path / "code")
    with pytest.raises(UserError, match="expected at most 65536"):
        Trust.of(tmp_path)


def test_each_policy_lets_in_what_it_should(anchor, contributions, signed, keys, tmp_path):
    unsigned = contributions["law"]
    assert verify(signed)["signed_by"]["public_key"] and verify(unsigned)["signed_by"] is None
    assert verify(signed, trust=Trust(signed=True))["signed_by"]
    for trust in (Trust(signed=True), Trust.of(keys / "trusted")):
        for refused in (
            lambda t=trust: verify(unsigned, trust=t),
            lambda t=trust: merge(anchor, [signed, unsigned], tmp_path / "no", gate=Gate(t)),
        ):
            with pytest.raises(UserError, match="is not signed"):
                refused()
        model = merge(
            anchor, [signed], tmp_path / f"model{trust.keys is None}", gate=Gate(trust)
        ).path
        with pytest.raises(UserError, match="is not signed"):
            append(model, unsigned, tmp_path / "no", gate=Gate(trust))
        with pytest.raises(UserError, match="is not signed"):
            replace(model, contributions["code"], tmp_path / "no", gate=Gate(trust))
    assert not (tmp_path / "no").exists()


def test_another_key_is_refused_by_name(signed, keys):
    (signed / SIGNATURE).write_bytes(
        sign((signed / MANIFEST).read_bytes(), load_key(keys / "mallory"))
    )
    assert verify(signed)["signed_by"]
    with pytest.raises(UserError, match="expected one of the listed ones: code, law"):
        verify(signed, trust=Trust.of(keys / "trusted"))


def test_an_edited_manifest_is_refused(signed):
    manifest = json.loads((signed / MANIFEST).read_text())
    (signed / MANIFEST).write_bytes(sealed(manifest | {"licence": "do as you like"}))
    with pytest.raises(UserError, match="is not one of its manifest"):
        verify(signed)


def test_the_tensors_of_another_contribution_are_refused(signed, contributions):
    shutil.copy(contributions["law"] / TENSORS, signed / TENSORS)
    with pytest.raises(UserError, match="are not those of the manifest"):
        verify(signed)


def test_the_signature_of_another_contribution_is_refused(signed, contributions, keys):
    (signed / SIGNATURE).write_bytes(
        sign((contributions["law"] / MANIFEST).read_bytes(), load_key(keys / "code"))
    )
    with pytest.raises(UserError, match="signed for another contribution"):
        verify(signed)


def test_every_flipped_bit_of_a_signature_is_found_whatever_the_policy(signed):
    content = (signed / SIGNATURE).read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        (signed / SIGNATURE).write_bytes(changed)
        with pytest.raises(UserError, match="signature") as error:
            open_contribution(signed).check()
        assert "\n" not in str(error.value)


def test_things_that_are_no_keys_are_refused(keys, tmp_path):
    other = ec.generate_private_key(ec.SECP256R1())
    encoding = serialization.Encoding.PEM
    (tmp_path / "other").write_bytes(
        other.private_bytes(
            encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    (tmp_path / "other.pub").write_bytes(
        other.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(UserError, match="expected Ed25519"):
        load_key(tmp_path / "other")
    with pytest.raises(UserError, match="expected Ed25519"):
        Trust.of(tmp_path)
    (tmp_path / "other.pub").write_text("hello")
    with pytest.raises(UserError, match="is not a public key"):
        Trust.of(tmp_path)
    with pytest.raises(UserError, match="is not a private key"):
        load_key(keys / "code.pub")
    with pytest.raises(UserError, match="cannot read the key"):
        load_key(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no public keys"):
        Trust.of(tmp_path / "nowhere")


@pytest.fixture
def trusted(keys, tmp_path) -> Path:
    return Path(shutil.copytree(keys / "trusted", tmp_path / "trusted"))


def signed_by(contribution: Path, key: Path, out: Path, **changes: str) -> Path:
    """A contribution that says something else, signed by a key."""
    shutil.copytree(contribution, out)
    (out / MANIFEST).write_bytes(sealed(json.loads((out / MANIFEST).read_text()) | changes))
    (out / SIGNATURE).write_bytes(sign((out / MANIFEST).read_bytes(), load_key(key)))
    return out


def test_a_policy_says_which_names_and_owners_a_key_may_sign(
    contributions, keys, trusted, tmp_path
):
    (trusted / "policy.yaml").write_text(
        "code: {names: [code, '123'], owners: [ACME, no]}\nlaw: {}\n"
    )
    for number, (key, changes, may) in enumerate(
        [
            ("code", {"owner": "ACME"}, True), ("code", {"owner": "no"}, True), ("code",
            {"owner": "ACME", "name": "123"}, True),
            ("code", {"owner": "acme"}, False), ("code", {"owner": "ACME", "name": "care"}, False),
            ("code", {}, False),
            ("law", {"owner": "ACME", "name": "code"}, True),
        ]
    ):  # fmt: skip
        contribution = signed_by(
            contributions["code"], keys / key, tmp_path / str(number), **changes
        )
        if may:
            assert verify(contribution, trust=Trust.of(trusted))["signed_by"]["name"] == key
            continue
        with pytest.raises(
            UserError,
            match=r"signed by the key code\.pub, which may sign experts called 'code' or '123'",
        ) as error:
            verify(contribution, trust=Trust.of(trusted))
        assert "\n" not in str(error.value)


def test_a_key_that_the_policy_does_not_list_may_sign_nothing(signed, trusted):
    (trusted / "policy.yaml").write_text("law: {}\n")
    with pytest.raises(UserError, match=r"code\.pub, which may sign experts called nothing"):
        verify(signed, trust=Trust.of(trusted))


BAD_POLICIES = {
    "nothing": "", "a list": "- code", "a string": "code", "no rule": "code:",
    "another key": "mallory: {}",
    "a name alone": "code: {names: code}", "an unknown part": "code: {name: [code]}",
    "a key twice": "code: {}\ncode: {}",
    "aliases": "code: &a {names: [x]}\nlaw: *a", "no YAML": "{", "no text": b"\xff\xfe",
    "depth": "code: {names: " + "[" * 5000,
    "a merge": "code: {<<: {names: [x]}}", "size": " " * 70_000,
    "two documents": "code: {}\n---\nlaw: {}",
    "a tag": "code: !!python/object/apply:os.getcwd []",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD_POLICIES.values(), ids=BAD_POLICIES.keys())
def test_a_policy_that_is_none_is_an_error_of_one_line(trusted, text):
    (trusted / "policy.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"policy\.yaml") as error:
        Trust.of(trusted)
    assert "\n" not in str(error.value)


def test_a_policy_that_would_not_be_read_and_a_key_given_twice_are_refused(trusted):
    (trusted / "policy.yml").write_text("code: {}")
    with pytest.raises(UserError, match=r"policy\.yml is not read; expected policy\.yaml"):
        Trust.of(trusted)
    (trusted / "policy.yml").unlink()
    shutil.copy(trusted / "code.pub", trusted / "another.pub")
    with pytest.raises(UserError, match=r"is the key of another\.pub too"):
        Trust.of(trusted)


@pytest.mark.parametrize(
    "part", ["spaces", "order", "base 64 of the key", "base 64 of the signature", "no new line"]
)
def test_a_right_signature_in_another_spelling_is_refused(signed, part):
    """One signature is one file: a second spelling of it would be a second meaning of the same
    bytes elsewhere."""
    text = (signed / SIGNATURE).read_bytes()
    fields = json.loads(text)

    def with_unused_bit(encoded: str) -> str:
        """The last digit before `=` has bits that no byte needs."""
        digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        last = len(encoded.rstrip("=")) - 1
        return encoded[:last] + digits[digits.index(encoded[last]) | 1] + encoded[last + 1 :]

    def spelled(**changes: str) -> bytes:
        return (json.dumps(fields | changes, sort_keys=True, separators=(",", ":")) + "\n").encode()

    assert spelled() == text
    other = {
        "spaces": (json.dumps(fields, sort_keys=True) + "\n").encode(),
        "order": (
            (json.dumps(dict(reversed(fields.items())), separators=(",", ":")) + "\n").encode()
        ),
        "base 64 of the key": spelled(public_key=with_unused_bit(fields["public_key"])),
        "base 64 of the signature": spelled(signature=with_unused_bit(fields["signature"])),
        "no new line": text[:-1],
    }[part]
    assert other != text
    (signed / SIGNATURE).write_bytes(other)
    with pytest.raises(UserError, match=r"not the canonical spelling|not canonical base 64"):
        verify(signed)
