"""What is made of a run is read from its checkpoint one parameter at a time, onto no device."""

import gc
import shutil
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.convert.exporting import export_hf
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import publish
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.owner.package import package
from flexolmo_jax.storage.checkpoint import StepCheckpoints, StepReader

Use = Callable[[Path], object]


@pytest.fixture
def uses(pair_runs, anchor_run, corpora, tmp_path) -> dict[str, tuple[Path, Use]]:
    """Everything that is made of a run: (the run, what makes it)."""
    out = tmp_path / "out"
    return {
        "publish": (anchor_run, lambda run: publish(run, [corpora["public"]], out)),
        "publish in float32": (
            anchor_run,
            lambda run: publish(run, [corpora["public"]], out, dtype="float32"),
        ),
        "export-hf": (anchor_run, lambda run: export_hf(run, out, max_shard_size=20_000)),
        "export-hf of a pair": (
            pair_runs["code"],
            lambda run: export_hf(run, out, drop_bias=True, max_shard_size=20_000),
        ),
        "package": (pair_runs["code"], lambda run: package(run, out)),
    }


NAMES = ("publish", "publish in float32", "export-hf", "export-hf of a pair", "package")


@pytest.mark.parametrize("use", NAMES)
def test_one_parameter_is_in_memory_at_a_time_and_each_is_read_once(use, uses, monkeypatch):
    run, make = uses[use]
    alive: list[weakref.ref] = []
    read: list[str] = []
    before = {id(array) for array in jax.live_arrays()}

    def whole(self: StepReader, path: str, whole=StepReader._whole) -> np.ndarray:
        deadline = time.monotonic() + 10  # a thread of Orbax may just be letting go of it
        while any(kept() is not None for kept in alive):
            assert time.monotonic() < deadline, f"{read[-1]} is still in memory"
            gc.collect()
        assert use == "package" or {id(a) for a in jax.live_arrays()} <= before, "on a device"
        read.append(path)
        values = whole(self, path)
        alive.append(weakref.ref(values))
        return values

    monkeypatch.setattr(StepReader, "_whole", whole)
    make(run)
    trained = set(open_artifact(run).description["tensors"])
    # Row 0 is another one in an anchor, and OLMo 2 has none.
    assert trained - {"experts/row"} <= set(read) <= trained and len(set(read)) == len(read)


@pytest.mark.parametrize("use", NAMES)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_left(
    use, uses, pair_runs, anchor_run, tmp_path
):
    run, make = uses[use]
    others = anchor_run if run != anchor_run else pair_runs["law"]
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(others / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="lacks parameters"):
        make(tmp_path / "run")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("use", NAMES)
def test_a_changed_byte_is_found_before_anything_is_read(use, uses, tmp_path):
    run, make = uses[use]
    shutil.copytree(run, tmp_path / "run")
    data = max(
        (tmp_path / "run" / "checkpoints").rglob("d/*"), key=lambda file: file.stat().st_size
    )
    changed = bytearray(data.read_bytes())
    changed[len(changed) // 2] ^= 1
    data.write_bytes(changed)
    with pytest.raises(UserError, match="is damaged"):
        make(tmp_path / "run")


def test_parts_of_leaves_are_those_that_a_restore_gives(anchor_run):
    artifact = open_artifact(anchor_run)
    arrays, params = artifact.arrays(), flatten(artifact.params())
    assert arrays.keys() == params.keys()
    for path, array in arrays.items():
        values = np.asarray(params[path])
        np.testing.assert_array_equal(array[:], values)
        np.testing.assert_array_equal(array.astype("bfloat16")[1], values.astype("bfloat16")[1])
    part = arrays["experts/gate"][1, 0]
    part[:] = 0  # a copy: changing it changes nothing that is read later
    np.testing.assert_array_equal(arrays["experts/gate"][1, 0], params["experts/gate"][1, 0])


@pytest.mark.parametrize(("shape", "dtype"), [((8,), "float32"), ((4,), "bfloat16")])
def test_a_leaf_of_another_shape_or_dtype_is_refused(shape, dtype, tmp_path):
    with StepCheckpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, {"params": {"trunk": {"norm": jax.numpy.zeros(4)}}})
        checkpoints.wait()
        target = {"trunk/norm": jax.ShapeDtypeStruct(shape, dtype)}
        reader = checkpoints.reader("params", target, 1)
        with pytest.raises(UserError, match=r"trunk/norm is float32 \[4\]; expected"):
            reader.read("trunk/norm", slice(None))
