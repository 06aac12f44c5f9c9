"""Signatures: who may hand over what, by real keys."""

import json
import shutil
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from flexolmo_jax.coordinator.merge import append, merge, replace
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.contribution import MANIFEST, SIGNATURE, TENSORS, open_contribution, sealed
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


def test_each_policy_lets_in_what_it_should(anchor, contributions, signed, keys, tmp_path):
    unsigned = contributions["law"]
    assert verify(signed)["signed_by"]["public_key"] and verify(unsigned)["signed_by"] is None
    assert verify(signed, trust=Trust(signed=True))["signed_by"]
    for trust in (Trust(signed=True), Trust.of(keys / "trusted")):
        for refused in (
            lambda t=trust: verify(unsigned, trust=t),
            lambda t=trust: merge(anchor, [signed, unsigned], tmp_path / "no", trust=t),
        ):
            with pytest.raises(UserError, match="is not signed"):
                refused()
        model = merge(anchor, [signed], tmp_path / f"model{trust.keys is None}", trust=trust).path
        with pytest.raises(UserError, match="is not signed"):
            append(model, unsigned, tmp_path / "no", trust=trust)
        with pytest.raises(UserError, match="is not signed"):
            replace(model, contributions["code"], tmp_path / "no", trust=trust)
    assert not (tmp_path / "no").exists()


def test_another_key_is_refused_by_name(signed, keys):
    (signed / SIGNATURE).write_bytes(sign((signed / MANIFEST).read_bytes(), load_key(keys / "mallory")))
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
    (signed / SIGNATURE).write_bytes(sign((contributions["law"] / MANIFEST).read_bytes(), load_key(keys / "code")))
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
    (tmp_path / "other").write_bytes(other.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    (tmp_path / "other.pub").write_bytes(other.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo))
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
