"""What must always hold of anchors, experts and merges (DESIGN's invariants 1 to 6), on a real
anchor and real contributions."""

import functools
import itertools
import json
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.coordinator.merge import merge, opt_out
from flexolmo_jax.coordinator.verify import verify, verify_receipt
from flexolmo_jax.description import canonical_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.anchor import open_anchor
from flexolmo_jax.exchange.contribution import MANIFEST, TENSORS, open_contribution
from flexolmo_jax.loaded import LoadedModel, load
from flexolmo_jax.model.tree import flatten, unflatten
from tests.tiny import DOMAINS, SEQ_LEN

IDS = np.random.default_rng(0).integers(0, 300, (3, SEQ_LEN))
# No shrinking: an example is seconds of reading and writing.
settings.register_profile("files", derandomize=True, phases=[Phase.explicit, Phase.generate])
few_examples = settings(settings.get_profile("files"), max_examples=3)
# Orbax leaves coroutines behind when one of many arrays cannot be read.
# They are collected in whichever test comes next.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(a) for name, a in flatten(open_artifact(path).params()).items()}


def bits(tree: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in tree.items()}


def files(path: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
    }


def reordered(loaded: LoadedModel, order: Sequence[int]) -> dict[str, np.ndarray]:
    """Parameters with experts in another order."""
    return {
        name: np.asarray(a)[:, order] if name.startswith("experts/") else np.asarray(a)
        for name, a in flatten(loaded.params).items()
    }


# ---- 1 ----


def test_merging_nothing_gives_the_anchor_bitwise(anchor, tmp_path):
    nothing = merge(anchor, [], tmp_path / "model").path
    assert bits(tensors(nothing)) == bits(tensors(anchor))
    assert load(nothing).logits(IDS).tobytes() == load(anchor).logits(IDS).tobytes()


# ---- 2 ----


@few_examples
@given(data=st.data())
def test_dropping_an_expert_equals_never_merging_it(anchor, contributions, data):
    order = data.draw(st.permutations(DOMAINS))
    merged = order[: data.draw(st.integers(1, 3))]
    dropped = data.draw(st.sets(st.sampled_from(merged), min_size=1))
    with tempfile.TemporaryDirectory() as folder:
        everything, without, never = (
            Path(folder) / name for name in ("everything", "without", "never")
        )
        merge(anchor, [contributions[name] for name in merged], everything)
        opt_out(everything, sorted(dropped), without)
        merge(anchor, [contributions[name] for name in merged if name not in dropped], never)
        receipt = without / "receipt.json"
        assert verify_receipt(receipt, without)["grade"] == "exact"
        assert verify_receipt(receipt, never)["verified"]
        with pytest.raises(UserError, match="still holds"):
            verify_receipt(receipt, everything)
        receipt.unlink()
        assert files(without) == files(never)
        assert len(files(never)) > 15
        assert canonical_json(open_artifact(without).description) == canonical_json(
            open_artifact(never).description
        )


# ---- 3 ----


def test_masking_an_expert_agrees_with_dropping_it(model, tmp_path):
    loaded = load(model)
    for without in (("law",), ("code", "care")):
        dropped = load(opt_out(model, without, tmp_path / "-".join(without)).path)
        expected, masked = dropped.logits(IDS), loaded.logits(IDS, without=without)
        np.testing.assert_allclose(masked, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        # it did take part before
        assert np.abs(masked - loaded.logits(IDS)).max() > 1e-3 * np.abs(expected).max()


def test_nan_in_a_masked_expert_changes_no_bit(model):
    loaded = load(model)
    for active in (1, 2, 3):
        clean = loaded.logits(IDS, without=("law",), active=active)
        index = loaded.experts.index("law")
        broken = {
            n: a.at[:, index].set(np.nan) if n.startswith("experts/") else a
            for n, a in flatten(loaded.params).items()
        }
        assert (
            LoadedModel(loaded.artifact, unflatten(broken))
            .logits(IDS, without=("law",), active=active)
            .tobytes()
            == clean.tobytes()
        )
        assert np.isfinite(clean).all()


# ---- 4 ----


def test_permuting_contributions_permutes_expert_indices_and_nothing_else(
    anchor, contributions, model, tmp_path
):
    names = list(contributions)
    logits = load(model).logits(IDS)
    for number, order in enumerate(itertools.islice(itertools.permutations(names), 1, 6, 2)):
        other = load(
            merge(
                anchor, [contributions[name] for name in order], tmp_path / str(number), active=2
            ).path
        )
        assert other.experts == ("anchor", *order)
        assert bits(
            reordered(other, [other.experts.index(name) for name in ("anchor", *names)])
        ) == bits(tensors(model))
        np.testing.assert_allclose(
            other.logits(IDS), logits, rtol=0, atol=1e-5 * np.abs(logits).max()
        )
        ours, theirs = open_artifact(model).description, other.artifact.description
        by_name = {m["name"]: m for m in ours["members"]}
        assert theirs["members"] == [by_name[name] for name in order]
        for key in ours.keys() - {"members", "experts", "sha256"}:
            assert ours[key] == theirs[key], key


# ---- 5 ----


def test_training_a_pair_leaves_trunk_and_anchor_expert_unchanged_and_without_optimiser_state(
    anchor, pair_runs
):
    frozen, pair = tensors(anchor), tensors(pair_runs["code"])
    assert bits({name: a for name, a in pair.items() if not name.startswith("expert/")}) == bits(
        frozen
    )
    start = frozen["experts/gate"].astype(np.float32)
    assert np.abs(pair["expert/gate"] - start).max() > 1e-4  # it did train

    (step,) = (pair_runs["code"] / "checkpoints").iterdir()
    with warnings.catch_warnings(), ocp.PyTreeCheckpointer() as checkpointer:
        warnings.simplefilter("ignore")  # Orbax prefers to be told shardings
        saved = checkpointer.restore((step / "default").absolute())
    expert = {name: a for name, a in pair.items() if name.startswith("expert/")}
    size = sum(a.nbytes for a in expert.values())
    assert {a.dtype for a in expert.values()} == {np.dtype(np.float32)}
    state = [np.asarray(a) for a in jax.tree.leaves(saved["optimizer"])]
    assert sum(a.nbytes for a in state if a.ndim) == 2 * size  # two moments
    # counters
    assert (
        all(a.dtype == np.int32 for a in state if not a.ndim)
        and len([a for a in state if not a.ndim]) == 2
    )
    assert set(flatten(saved["params"])) == set(expert)
    names = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(saved)[0]
    ]
    assert not [name for name in names if "trunk" in name or "'experts'" in name]


def test_a_pairs_checkpoint_holds_no_copy_of_the_anchor_on_disk(anchor, pair_runs):
    data = b"".join(
        p.read_bytes() for p in (pair_runs["code"] / "checkpoints").rglob("*") if p.is_file()
    )
    assert b"trunk" not in data and b"experts." not in data
    expert = sum(
        a.nbytes for name, a in tensors(pair_runs["code"]).items() if name.startswith("expert/")
    )
    assert len(data) < 3 * expert + 60_000  # expert, two moments, Orbax's own descriptions


# ---- 6 ----


def test_a_contribution_to_another_anchor_is_refused_whatever_its_tensors_are(
    anchor32, contributions, tmp_path
):
    other = open_anchor(anchor32)
    for content in (None, b"garbage"):
        copy = Path(shutil.copytree(contributions["code"], tmp_path / str(content)))
        (copy / TENSORS).unlink()
        if content:
            (copy / TENSORS).write_bytes(content)
        for refuse in (
            lambda c=copy: open_contribution(c).check(other),
            lambda c=copy: merge(anchor32, [c], tmp_path / "m"),
        ):
            with pytest.raises(UserError, match="was made from the anchor") as error:
                refuse()
            assert other.fingerprint is not None and other.fingerprint[:16] in str(error.value)
    assert not (tmp_path / "m").exists()


@functools.lru_cache
def parts_of(contribution: Path) -> dict[str, tuple[str, range]]:
    """Kinds of bytes: (file, positions)."""
    size = (contribution / TENSORS).stat().st_size
    header = 8 + int.from_bytes((contribution / TENSORS).read_bytes()[:8], "little")
    return {
        "length of the header": (TENSORS, range(8)),
        "header": (TENSORS, range(8, header)),
        # spaces: any white space is the same JSON
        "end of the header": (TENSORS, range(header - 8, header)),
        "data": (TENSORS, range(header, size)),
        "manifest": (MANIFEST, range((contribution / MANIFEST).stat().st_size)),
    }


@pytest.mark.parametrize(
    "part", ["length of the header", "header", "end of the header", "data", "manifest"]
)
@settings(settings.get_profile("files"), max_examples=8)
@given(data=st.data())
def test_a_changed_byte_anywhere_in_a_contribution_is_refused(anchor, contributions, part, data):
    contribution = contributions["law"]
    name, positions = parts_of(contribution)[part]
    position, flip = data.draw(st.sampled_from(positions)), data.draw(st.integers(1, 255))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(contribution, Path(folder) / "copy"))
        content = bytearray((copy / name).read_bytes())
        content[position] ^= flip
        (copy / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            verify(copy, anchor)
        assert "\n" not in str(error.value)
        with pytest.raises(UserError):
            merge(anchor, [copy], Path(folder) / "model")
        assert not (Path(folder) / "model").exists()


def test_an_intact_contribution_is_verified(anchor, contributions):
    assert verify(contributions["law"], anchor)["verified"]


def test_a_changed_byte_in_the_weights_of_an_anchor_is_found_and_not_merged(
    anchor, contributions, tmp_path
):
    rng = np.random.default_rng(1)
    chunks = [p for p in sorted((anchor / "weights").rglob("c/**/*")) if p.is_file()]
    assert len(chunks) >= 14
    for number in range(4):
        copy = Path(shutil.copytree(anchor, tmp_path / str(number)))
        chunk = copy / chunks[rng.integers(len(chunks))].relative_to(anchor)
        content = bytearray(chunk.read_bytes())
        # behind the compressor's own header
        content[rng.integers(20, len(content) - 4)] ^= 1 << int(rng.integers(8))
        chunk.write_bytes(content)
        with pytest.raises(UserError, match=r"bytes of|cannot be read"):
            verify(copy)
        with pytest.raises(UserError):
            merge(copy, [contributions["law"]], tmp_path / "model")
        assert not (tmp_path / "model").exists()


def test_a_damaged_model_is_not_given_a_clean_bill_by_opting_out(model, tmp_path):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    description = json.loads((copy / "flexolmo.json").read_text())
    description["tensors"]["trunk/embedding"]["sha256"] = "0" * 64
    (copy / "flexolmo.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"flexolmo\.json is damaged"):
        opt_out(copy, ["law"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the format ----


def test_plain_orbax_restores_a_merged_model(model):
    with (
        warnings.catch_warnings(),
        ocp.PyTreeCheckpointer() as plain,
        ocp.StandardCheckpointer() as standard,
    ):
        warnings.simplefilter("ignore")  # Orbax prefers to be told shardings
        for checkpointer in (plain, standard):
            restored = flatten(checkpointer.restore((model / "weights").absolute()))
            assert bits({name: np.asarray(a) for name, a in restored.items()}) == bits(
                tensors(model)
            )
