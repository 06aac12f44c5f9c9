"""The store and what is composed of it: every way gives the same bits, on any devices, and nothing
is kept that nobody needs."""

import hashlib
import json
import shutil
import stat
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from flexolmo_jax.artifact import active_among, open_artifact, read_sealed, write_description
from flexolmo_jax.config import MeshConfig, ModelConfig
from flexolmo_jax.coordinator.info import info
from flexolmo_jax.coordinator.merge import append, merge, opt_out, replace
from flexolmo_jax.coordinator.receipt import TUNED
from flexolmo_jax.coordinator.router import train_router
from flexolmo_jax.coordinator.store import STORE, Store
from flexolmo_jax.coordinator.verify import verify, verify_receipt
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.contribution import TENSORS
from flexolmo_jax.loaded import load
from flexolmo_jax.model import init_params, logical_axes
from flexolmo_jax.model.tree import flatten, unflatten
from flexolmo_jax.runtime import sharding
from flexolmo_jax.storage import weights
from tests.faults.kill_everywhere import contents
from tests.tiny import SEQ_LEN, run_config


def on_8_devices(directory: Path) -> dict[str, np.ndarray]:
    """What plain Orbax restores over 8 devices, each array split along the first axis that 8
    divides."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    with warnings.catch_warnings(), ocp.StandardCheckpointer() as plain:
        warnings.simplefilter("ignore")
        stored = plain.metadata(directory.absolute())
        stored = getattr(stored, "item_metadata", stored)

        def target(array) -> jax.ShapeDtypeStruct:
            axis = next((i for i, n in enumerate(array.shape) if n % 8 == 0), None)
            spec = PartitionSpec(*("x" if i == axis else None for i in range(len(array.shape))))
            return jax.ShapeDtypeStruct(
                array.shape, array.dtype, sharding=NamedSharding(mesh, spec)
            )

        restored = plain.restore(directory.absolute(), jax.tree.map(target, dict(stored)))
    assert max(len(a.sharding.device_set) for a in jax.tree.leaves(restored)) == 8
    return {name: np.asarray(a) for name, a in flatten(restored).items()}


def stacked(anchor: Path, contributions: list[Path]) -> dict[str, np.ndarray]:
    """The oracle: restore the anchor, stack the experts' tensors behind its own."""
    arrays = {name: np.asarray(a) for name, a in flatten(open_anchor(anchor).params()).items()}
    experts = [load_file(path / TENSORS) for path in contributions]
    L = arrays["experts/row"].shape[0]
    for leaf, tensor in (
        ("gate", "ffn.gate"),
        ("up", "ffn.up"),
        ("down", "ffn.down"),
        ("row", "router.row"),
        ("bias", "router.bias"),
    ):
        added = [
            np.stack([e[f"layers.{layer}.{tensor}"] for layer in range(L)])[:, None]
            for e in experts
        ]
        own = arrays.get(f"experts/{leaf}", np.zeros_like(added[0]))
        arrays[f"experts/{leaf}"] = np.concatenate([own, *added], axis=1)
    return arrays


def test_every_way_gives_the_same_bits_as_stacking_in_memory(anchor, contributions, tmp_path):
    paths = list(contributions.values())
    expected = stacked(anchor, paths)
    # the oracle's own checkpoint, as plain Orbax writes it
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(
            (tmp_path / "oracle").absolute(),
            unflatten({k: jnp.asarray(v) for k, v in expected.items()}),
        )
    restored = {"oracle": on_8_devices(tmp_path / "oracle")}
    models = {}
    for way in ("link", "copy", "stream"):
        models[way] = merge(anchor, paths, tmp_path / way, ways=(way,)).path
        restored[way] = on_8_devices(models[way] / "weights")
    for way, arrays in restored.items():
        assert arrays.keys() == expected.keys()
        for name, array in arrays.items():
            assert (array.dtype, array.shape, array.tobytes()) == (
                expected[name].dtype,
                expected[name].shape,
                expected[name].tobytes(),
            ), (
                way,
                name,
            )
    assert contents(models["link"]) == contents(models["copy"]) == contents(models["stream"])
    dropped = [
        opt_out(models["link"], ["care"], tmp_path / f"without by {way}", ways=(way,)).path
        for way in models
    ]
    assert contents(dropped[0]) == contents(dropped[1]) == contents(dropped[2])
    shard = next(
        p for p in sorted((models["link"] / "weights/experts.up/c").rglob("*")) if p.is_file()
    )
    assert shard.stat().st_nlink >= 2 and stat.S_IMODE(shard.stat().st_mode) == 0o444
    assert (models["copy"] / shard.relative_to(models["link"])).stat().st_nlink == 1


def test_where_links_cannot_be_made_files_are_copied(
    anchor, contributions, tmp_path, monkeypatch, capsys
):
    import errno
    import os

    def elsewhere(*_, **__):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", elsewhere)
    model = merge(anchor, [contributions["code"]], tmp_path / "model").path
    told = capsys.readouterr().err
    assert "files by copy" in told or "files by reflink" in told
    assert verify(model)["verified"]
    with pytest.raises(UserError, match=r"by link: .*cross-device.*--by auto"):
        merge(anchor, [contributions["code"]], tmp_path / "no", ways=("link",))


def test_weights_in_another_layout_are_refused_by_name(anchor, tmp_path):
    """As plain Orbax would have written them: one chunk an array, compressed. What verify read
    would not be what load reads."""
    other = Path(shutil.copytree(anchor, tmp_path / "other"))
    shutil.rmtree(other / "weights")
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            (other / "weights").absolute(), args=ocp.args.PyTreeSave(open_anchor(anchor).params())
        )
    for use in (verify, load, open_anchor):
        with pytest.raises(UserError, match="another layout"):
            use(other)


def test_a_restore_along_fsdp_reads_little_more_than_its_share(tmp_path):
    config = ModelConfig(
        vocab_size=2048,
        d_model=1024,
        n_layers=1,
        n_heads=8,
        n_kv_heads=8,
        d_ffn=2816,
        n_experts=3,
        n_active=2,
    )
    params = flatten(init_params(config, jax.random.key(0)))
    axes = flatten(logical_axes(config))
    weights.save(tmp_path / "weights", {path: np.asarray(a) for path, a in params.items()}, axes)
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    target = {
        path: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=sharding.parameter_sharding(mesh, axes[path], a.shape)
        )
        for path, a in params.items()
    }
    assert sum(1 for a in target.values() if a.sharding.spec.count("fsdp")) >= 7
    before = bytes_read()
    with ocp.StandardCheckpointer() as plain:
        restored = flatten(plain.restore((tmp_path / "weights").absolute(), unflatten(target)))
    read, size = bytes_read() - before, sum(a.nbytes for a in params.values())
    print(f"read {read / size:.3f} times the bytes of the model over 8 devices")
    assert size <= read <= 1.2 * size
    assert all(
        np.asarray(a).tobytes() == np.asarray(params[path]).tobytes()
        for path, a in restored.items()
    )


def bytes_read() -> int:
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def test_gc_names_the_models_that_are_not_where_they_were(anchor, contributions, tmp_path):
    """What only a moved model is made of goes, and whoever moved it is to see that."""
    model = merge(anchor, [contributions["code"]], tmp_path / "model").path
    store, moved = Store.existing(tmp_path / STORE), model.rename(tmp_path / "moved")
    collected = store.gc()
    assert collected["no_longer_there"] == [str(model)] and collected["kept"] == []
    assert verify(moved)["verified"] and "no_longer_there" not in store.gc()


def test_gc_removes_what_no_model_is_made_of_and_nothing_else(anchor, contributions, tmp_path):
    both = merge(anchor, [contributions["code"], contributions["law"]], tmp_path / "both").path
    one = opt_out(both, ["law"], tmp_path / "one").path
    store = Store.existing(tmp_path / STORE)
    told = info(tmp_path / STORE)
    assert told["objects"] == 3 and told["bytes"] > 50_000
    assert told["models"] == {str(both): ["anchor", "code", "law"], str(one): ["anchor", "code"]}
    assert store.gc()["removed"] == []
    shutil.rmtree(both)
    collected = store.gc()
    assert (
        len(collected["removed"]) == 1
        and collected["bytes"] > 10_000
        and len(collected["kept"]) == 2
    )
    assert verify(one)["verified"] and store.gc()["removed"] == []
    again = append(one, contributions["law"], tmp_path / "again").path  # taken in anew
    assert verify(again)["verified"] and len(store.gc()["kept"]) == 3
    with pytest.raises(UserError, match="is not a store"):
        Store.existing(tmp_path / "one")


def test_a_receipt_names_what_is_gone_and_who_still_has_it(anchor, contributions, tmp_path):
    both = merge(anchor, [contributions["code"], contributions["law"]], tmp_path / "both").path
    copy = Path(shutil.copytree(both, tmp_path / "moved-here-by-hand"))
    one = opt_out(both, ["law"], tmp_path / "one").path
    receipt = read_sealed(one / "receipt.json")
    (removed,) = receipt["removed"]
    tensors = load_file(contributions["law"] / TENSORS)
    assert set(removed["digests"]) == {
        hashlib.sha256(a.tobytes()).hexdigest() for name, a in tensors.items() if "bias" not in name
    }
    assert (
        removed["name"] == "law"
        and receipt["grade"] == "exact"
        and [m["name"] for m in receipt["remaining"]] == ["code"]
    )
    assert receipt["models_that_still_hold_it"] == ["both"] and receipt["store_still_holds_it"]
    # where things lie is the coordinator's business
    assert str(tmp_path) not in (one / "receipt.json").read_text()
    assert verify_receipt(one / "receipt.json", one)["digests"] == 8
    for holder in (both, copy, append(one, contributions["law"], tmp_path / "back").path):
        with pytest.raises(UserError, match="still holds"):
            verify_receipt(one / "receipt.json", holder)
    with pytest.raises(UserError, match="other contributions"):
        verify_receipt(
            one / "receipt.json", merge(anchor, [contributions["care"]], tmp_path / "care").path
        )
    shutil.rmtree(both)
    shutil.rmtree(tmp_path / "back")
    Store.existing(tmp_path / STORE).gc()
    last = read_sealed(
        opt_out(
            merge(anchor, [contributions["law"]], tmp_path / "law").path, ["law"], tmp_path / "none"
        ).path
        / "receipt.json"
    )
    assert last["models_that_still_hold_it"] == ["law"]


def test_a_forged_receipt_and_a_forged_model_are_refused(anchor, contributions, tmp_path):
    both = merge(anchor, [contributions["code"], contributions["law"]], tmp_path / "both").path
    one = opt_out(both, ["law"], tmp_path / "one").path
    text = (one / "receipt.json").read_text()
    (tmp_path / "forged.json").write_text(text.replace('"exact"', '"exacT"'))
    with pytest.raises(UserError, match="is damaged"):
        verify_receipt(tmp_path / "forged.json", one)
    # Says that it has no "law" but kept its files, where "code" should be.
    forged = Path(shutil.copytree(one, tmp_path / "forged"))
    for path in (both / "weights").glob("experts.*/c/*/2/**/*"):
        if path.is_file():
            target = forged / str(path.relative_to(both)).replace("/2/", "/1/", 1)
            target.unlink()
            shutil.copy(path, target)
    with pytest.raises(UserError, match="still holds"):
        verify_receipt(one / "receipt.json", forged)


def test_an_expert_with_the_weights_of_one_that_leaves_has_to_leave_too(
    anchor, contributions, tmp_path
):
    from flexolmo_jax.exchange.contribution import MANIFEST, sealed

    twin = Path(shutil.copytree(contributions["law"], tmp_path / "twin"))
    (twin / MANIFEST).write_bytes(
        sealed(json.loads((twin / MANIFEST).read_text()) | {"name": "twin"})
    )
    model = merge(anchor, [contributions["law"], twin], tmp_path / "model").path
    with pytest.raises(UserError, match="'twin' is a copy of 'law', or nearly one"):
        opt_out(model, ["law"], tmp_path / "out")
    assert open_artifact(opt_out(model, ["law", "twin"], tmp_path / "out").path).experts == (
        "anchor",
    )


def test_opting_out_of_a_tuned_router_keeps_the_tuned_rows_and_lowers_the_grade(
    model, prepared, tmp_path
):
    run = run_config("router", prepared["public"], "train.steps=3", router={"model": str(model)})
    train_router(run, tmp_path / "run")
    out = opt_out(tmp_path / "run", ["law"], tmp_path / "out", store_path=tmp_path / "store").path
    tuned, opted = load(tmp_path / "run"), load(out)
    kept = [i for i, name in enumerate(tuned.experts) if name != "law"]
    for leaf in ("row", "bias"):
        expected = np.asarray(tuned.params["experts"][leaf]).astype(
            opted.params["experts"][leaf].dtype
        )[:, kept]
        assert np.asarray(opted.params["experts"][leaf]).tobytes() == expected.tobytes()
    assert (
        np.asarray(opted.params["experts"]["row"]).tobytes()
        != np.asarray(load(model).params["experts"]["row"])[:, kept].tobytes()
    )
    assert read_sealed(out / "receipt.json")["grade"] == TUNED
    assert verify(out)["verified"] and verify_receipt(out / "receipt.json", out)["grade"] == TUNED
    again = opt_out(out, ["code"], tmp_path / "again", store_path=tmp_path / "store").path
    assert verify(again)["verified"] and read_sealed(again / "receipt.json")["grade"] == TUNED
    ids = np.ones((1, SEQ_LEN), int)
    assert np.isfinite(load(again).logits(ids)).all()
    with pytest.raises(UserError, match="still holds"):
        verify_receipt(again / "receipt.json", out)


def test_a_model_changed_behind_its_description_is_found(model, tmp_path):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (copy / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="unknown files"):
        verify(copy)
    (copy / "notes.txt").unlink()
    description = open_artifact(copy).description
    description["members"][0]["manifest"]["licence"] = "another"
    write_description(copy, description)
    with pytest.raises(UserError, match="manifest of 'code' is damaged"):
        verify(copy)


def test_a_replaced_expert_is_the_newer_one_in_the_same_place(anchor, contributions, tmp_path):
    both = merge(anchor, [contributions["code"], contributions["law"]], tmp_path / "both").path
    copy = Path(shutil.copytree(contributions["code"], tmp_path / "copy"))
    assert contents(replace(both, copy, tmp_path / "same").path) == contents(both)
    assert contents(
        append(
            opt_out(both, ["law"], tmp_path / "one").path, contributions["law"], tmp_path / "again"
        ).path
    ) == contents(both)
    with pytest.raises(UserError, match="no expert 'care'"):
        replace(both, contributions["care"], tmp_path / "no")
    with pytest.raises(UserError, match="already has an expert 'code'; `flexolmo replace`"):
        append(both, contributions["code"], tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("active", "of", "experts", "expected"),
    [
        (4, 6, 7, 4),
        (6, 6, 7, 6),
        (6, 6, 5, 5),
        (3, 3, 5, 4),
        (3, 3, 2, 2),
        (2, 3, 2, 2),
        (1, 2, 3, 1),
        (4, 4, 5, 4),
        (5, 5, 6, 5),
    ],
)
def test_a_number_of_active_experts_that_was_given_stays_and_one_that_was_not_goes_with_them(
    active, of, experts, expected
):
    """4, or all where there are fewer, is what nobody asked for."""
    assert active_among(ModelConfig(n_experts=of, n_active=active), experts) == expected


@pytest.mark.parametrize("active", [-1, 0, 3])
def test_more_active_experts_than_there_are_and_none_are_refused(
    anchor, contributions, tmp_path, active
):
    with pytest.raises(UserError, match=f"--active is {active}; expected 1 to 2"):
        merge(anchor, [contributions["code"]], tmp_path / "out", active=active)
    assert not (tmp_path / "out").exists() and not (tmp_path / STORE).exists()


def test_a_damaged_copy_of_what_the_store_holds_is_refused_and_a_good_one_is_said_to_be_there(
    anchor, contributions, tmp_path, capsys
):
    held = "code: the store holds its weights already, and the model gets those"
    merge(anchor, [contributions["code"]], tmp_path / "first")
    assert held not in capsys.readouterr().err
    copy = Path(shutil.copytree(contributions["code"], tmp_path / "copy"))
    merge(anchor, [copy], tmp_path / "second")
    assert held in capsys.readouterr().err
    content = bytearray((copy / TENSORS).read_bytes())
    content[-1] ^= 1
    (copy / TENSORS).write_bytes(content)
    with pytest.raises(UserError, match="layers"):
        merge(anchor, [copy], tmp_path / "third")
    assert not (tmp_path / "third").exists()
