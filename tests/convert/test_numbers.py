"""Numbers on their way between formats: which are cast, and that none is lost without a word."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from flexolmo_jax import cli
from flexolmo_jax.convert.exporting import export_hf
from flexolmo_jax.convert.importing import import_hf
from flexolmo_jax.coordinator.merge import merge
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import publish
from flexolmo_jax.owner.package import package_imported
from flexolmo_jax.storage import tensorfile
from tests.convert.conftest import DENSE, MOE

NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate.weight"
UP = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize("name", [NORM, GATE])
@pytest.mark.parametrize("rest", [ml_dtypes.bfloat16, np.float16])
def test_float32_norms_and_gates_among_others_are_cast_with_a_note(
    checkpoint, tmp_path, capsys, name, rest
):
    def keep_in_float32(tensors, fields):
        tensors[name] = np.asarray(tensors[name], np.float32) * np.float32(1.2345678)

    source = checkpoint(dtype=rest, change=keep_in_float32)
    dtype = np.dtype(rest).name
    assert import_hf(source, tmp_path / "model").dtype == dtype
    assert f"cast from float32 to {dtype}: {name}; --dtype float32" in capsys.readouterr().err
    export_hf(tmp_path / "model", tmp_path / "back")
    theirs, ours = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    for key, tensor in theirs.items():
        assert ours[key].dtype == rest and np.array_equal(ours[key], tensor.astype(rest)), key


def test_the_dtype_of_an_import_can_be_chosen(checkpoint, tmp_path, capsys):
    def keep_in_float32(tensors, fields):
        tensors[NORM] = np.linspace(0, 1, 24, dtype=np.float32)

    source = checkpoint(change=keep_in_float32)
    command = ["import-hf", str(source), str(tmp_path / "model"), "--dtype", "float32", "--json"]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "float32"
    export_hf(tmp_path / "model", tmp_path / "back")
    theirs, ours = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert all(np.array_equal(ours[key], theirs[key].astype(np.float32)) for key in theirs)
    with pytest.raises(UserError, match="--dtype is 'int8'; expected one of"):
        import_hf(source, tmp_path / "other", dtype="int8")


@pytest.mark.parametrize("source_dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (70000.0, False), (-1e30, False)])
def test_values_beyond_float16_are_refused_by_name(checkpoint, tmp_path, source_dtype, value, fits):
    def enlarge(tensors, fields):
        tensors[UP][3, 1] = value

    source = checkpoint(dtype=source_dtype, change=enlarge)
    stored = float(np.asarray(value, source_dtype))
    fits = fits and stored <= 65504
    model = import_hf(source, tmp_path / "model").path
    told = rf"{re.escape(UP)}.* has the value {re.escape(str(stored))}, which is beyond float16"
    for convert, given in ((export_hf, model), (import_hf, source)):
        out = tmp_path / convert.__name__
        if fits:
            convert(given, out, dtype="float16")
            continue
        with pytest.raises(UserError, match=told):
            convert(given, out, dtype="float16")
        assert not out.exists()


@pytest.fixture
def unchecked(monkeypatch):
    """As earlier versions wrote: nothing looks at the numbers, until it is set to `True`."""
    look = {"at all": False}
    finite = tensorfile._not_finite
    monkeypatch.setattr(
        tensorfile, "_not_finite", lambda values: finite(values) if look["at all"] else None
    )
    return look


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_wherever_an_artefact_is_made(
    checkpoint, corpora, tmp_path, unchecked, value
):
    public = [corpora["public"]]

    def spoil(tensors, fields):
        tensors[UP][0, 0] = value

    source = checkpoint(MOE, change=spoil)
    model = import_hf(source, tmp_path / "model").path
    anchor = publish(model, public, tmp_path / "anchor", seq_len=32).path

    def spoil_all(tensors, fields):
        tensors["model.embed_tokens.weight"][7, 0] = value

    broken = checkpoint(DENSE, name="broken-hf", change=spoil_all)
    dense = import_hf(broken, tmp_path / "dense").path
    old = publish(dense, public, tmp_path / "old", seq_len=32).path

    unchecked["at all"] = True
    shown = f"has the value {value}; expected finite numbers"
    for name, make in {
        UP: lambda out: import_hf(source, out),
        f"{UP} ": lambda out: export_hf(model, out, dtype="float32"),
        f"{UP}  ": lambda out: export_hf(model, out),
        "layers.1.ffn.up": lambda out: package_imported(model, "expert2", anchor, out),
        "trunk/embedding": lambda out: publish(dense, public, out, seq_len=32),
        "trunk/embedding of": lambda out: merge(old, [], out, store_path=tmp_path / "store"),
    }.items():
        with pytest.raises(UserError, match=rf"{re.escape(name.strip())}.* {re.escape(shown)}"):
            make(tmp_path / "out")
        assert not (tmp_path / "out").exists(), name
