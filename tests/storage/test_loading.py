"""Weights onto devices: the bits that the reader reads, whatever the mesh, in bounded memory, with
nothing left under way."""

import json
import shutil
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import SingleDeviceSharding

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.config import MeshConfig, ModelConfig
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import init_params, logical_axes
from flexolmo_jax.model.tree import flatten, unflatten
from flexolmo_jax.runtime.sharding import make_mesh, parameter_sharding
from flexolmo_jax.storage import loading, weights
from flexolmo_jax.storage.weights import Reader

CONFIG = ModelConfig(
    vocab_size=512,
    d_model=128,
    n_layers=3,
    n_heads=8,
    n_kv_heads=8,
    d_ffn=264,
    n_experts=3,
    n_active=2,
)
MESHES = [
    None,
    MeshConfig(fsdp=8),
    MeshConfig(tensor=8),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(expert=4, fsdp=2),
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A model's weights on a disk, and what they are."""
    arrays = {
        path: np.asarray(a) for path, a in flatten(init_params(CONFIG, jax.random.key(0))).items()
    }
    directory = tmp_path_factory.mktemp("loading") / "weights"
    weights.save(directory, arrays, flatten(logical_axes(CONFIG)))
    return directory, arrays


def target(arrays: dict[str, np.ndarray], config: MeshConfig | None = None) -> dict:
    mesh = config and make_mesh(config)
    axes, one = flatten(logical_axes(CONFIG)), SingleDeviceSharding(jax.devices()[0])
    placed = {
        path: parameter_sharding(mesh, axes[path], a.shape) if mesh else one
        for path, a in arrays.items()
    }
    return unflatten(
        {
            path: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed[path])
            for path, a in arrays.items()
        }
    )


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(
    "piece", [loading.PIECE, 20_000], ids=["whole parts", "many pieces a part"]
)
def test_every_device_gets_the_bits_of_its_part(stored, monkeypatch, piece, mesh):
    directory, arrays = stored
    monkeypatch.setattr(loading, "PIECE", piece)
    assert_same_bits(directory, arrays, mesh)


@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=2, tensor=2)], ids=str)
def test_pieces_come_together_in_the_memory_of_devices_that_have_their_own(
    stored, monkeypatch, mesh
):
    directory, arrays = stored
    monkeypatch.setattr(loading, "PIECE", 70_000)
    monkeypatch.setattr(loading, "IN_HOST_MEMORY", ())
    assert_same_bits(directory, arrays, mesh)


def assert_same_bits(
    directory: Path, arrays: dict[str, np.ndarray], mesh: MeshConfig | None
) -> None:
    wanted = flatten(target(arrays, mesh))
    for path, array in flatten(loading.load(Reader(directory), target(arrays, mesh))).items():
        assert (array.shape, array.dtype, array.sharding) == (
            wanted[path].shape,
            wanted[path].dtype,
            wanted[path].sharding,
        )
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == arrays[path][shard.index].tobytes(), (
                path,
                shard.device,
            )


def test_no_more_is_read_than_the_devices_hold(tmp_path):
    """Of arrays that are large enough to be stored in chunks along the axis that they are spread
    over."""
    whole = np.arange(2 * 1024 * 2048, dtype=np.float32).reshape(2, 1024, 2048)
    weights.save(tmp_path, {"a": whole}, {"a": ("layers", "embed", "ffn")})
    spread = parameter_sharding(
        make_mesh(MeshConfig(fsdp=8)), ("layers", "embed", "ffn"), whole.shape
    )

    def bytes_read() -> int:
        metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return sum(value["value"] for metric in metrics for value in metric["values"])

    before = bytes_read()
    loaded = loading.load(
        Reader(tmp_path), {"a": jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=spread)}
    )
    assert whole.nbytes <= bytes_read() - before <= 1.1 * whole.nbytes
    np.testing.assert_array_equal(np.asarray(loaded["a"]), whole)


def test_few_pieces_are_in_memory_at_once(stored, monkeypatch):
    """However many there are: those that are read ahead, and the one that is being placed."""
    directory, arrays = stored
    monkeypatch.setattr(loading, "PIECE", 20_000)
    started, placed, most, lock = 0, 0, 0, threading.Lock()
    read, put = Reader.read, loading._OnHost.put

    def counted(self, path, box):
        nonlocal started, most
        with lock:
            started += 1
            most = max(most, started - placed)
        values = read(self, path, box)
        assert values.nbytes <= max(20_000, np.prod(self.chunk(path)) * values.itemsize)
        return values

    def slowly(self, place, values):
        nonlocal placed
        put(self, place, values)
        time.sleep(0.001)
        with lock:
            placed += 1

    monkeypatch.setattr(Reader, "read", counted)
    monkeypatch.setattr(loading._OnHost, "put", slowly)
    loading.load(Reader(directory), target(arrays))
    assert started == placed > 5 * most and most <= loading.AHEAD + 1


@pytest.mark.parametrize(
    "error", [UserError("damaged"), KeyboardInterrupt()], ids=["an error", "an interrupt"]
)
def test_what_was_started_is_waited_for_when_something_fails(stored, monkeypatch, error):
    directory, arrays = stored
    monkeypatch.setattr(loading, "PIECE", 20_000)
    running, lock, read = set(), threading.Lock(), Reader.read

    def slowly(self, path, box):
        mark = object()
        with lock:
            running.add(mark)
            number = len(running)
        time.sleep(0.05)
        values = read(self, path, box)
        with lock:
            running.remove(mark)
        if isinstance(error, UserError) and number == 2:
            raise error
        return values

    def interrupted(self, place, values):
        raise error

    monkeypatch.setattr(Reader, "read", slowly)
    if isinstance(error, KeyboardInterrupt):
        monkeypatch.setattr(loading._OnHost, "put", interrupted)
    with pytest.raises(type(error)):
        loading.load(Reader(directory), target(arrays))
    assert not running and not [
        thread for thread in threading.enumerate() if thread.name.startswith("weights")
    ]


def test_what_lies_beside_the_arrays_is_not_believed(model, tmp_path):
    """Descriptions and databases of Orbax say nothing to the reader; to whoever loads a model they
    are a reason to refuse it."""
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    right = {
        path: np.asarray(a).tobytes() for path, a in flatten(open_artifact(model).params()).items()
    }
    metadata = json.loads((copy / "weights" / "_METADATA").read_text())
    (copy / "weights" / "_METADATA").write_text(
        json.dumps(metadata | {"use_ocdbt": True, "tree_metadata": {}})
    )
    other = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{copy / 'weights'}/"}}
    lie = {"driver": "zarr3", "kvstore": other, "metadata": {"shape": [4], "data_type": "float32"}}
    ts.open(lie, create=True).result().write(np.ones(4, np.float32)).result()
    assert (copy / "weights" / "manifest.ocdbt").exists()
    arrays = {path: np.asarray(a) for path, a in flatten(open_artifact(model).params()).items()}
    loaded = flatten(loading.load(Reader(copy / "weights"), target(arrays)))
    assert {path: np.asarray(a).tobytes() for path, a in loaded.items()} == right
    with pytest.raises(UserError, match="_METADATA does not belong to these tensors"):
        open_artifact(copy).params()


def test_arrays_that_are_not_as_described_are_refused(stored):
    directory, arrays = stored
    for change in (
        {"trunk/norm/scale": np.zeros(64, np.float32)},
        {"trunk/norm/scale": np.zeros(128, np.float16)},
    ):
        with pytest.raises(
            UserError,
            match=r"trunk/norm/scale .* are float32 \[128\]; expected float(32|16) \[\d+\]",
        ):
            loading.load(Reader(directory), target(arrays | change))
    with pytest.raises(UserError, match="cannot be read"):
        loading.load(Reader(directory), {"nothing": target(arrays)["trunk"]["norm"]["scale"]})


def test_a_missing_shard_is_an_error_of_the_reader_too(stored, tmp_path):
    directory, arrays = stored
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    next(p for p in sorted((copy / "experts.up" / "c").rglob("*")) if p.is_file()).unlink()
    with pytest.raises(UserError, match=r"experts/up .* cannot be read"):
        loading.load(Reader(copy), target(arrays))
