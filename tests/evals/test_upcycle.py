"""What other methods start from, and as many steps as equal FLOPs are."""

import numpy as np
import pytest

from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.data.records import open_records
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.mixed import mixed_documents
from flexolmo_jax.evals.upcycle import assemble, steps_of_flops
from flexolmo_jax.loaded import load
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.train.flops import step_flops
from flexolmo_jax.train.pretrain import pretrain
from tests.tiny import SEQ_LEN, pair_config, run_config


def test_an_upcycled_anchor_says_what_the_anchor_says_until_it_is_trained(
    anchor32, prepared, tmp_path
):
    model = assemble(
        {"anchor": anchor32, "a": anchor32, "b": anchor32}, tmp_path / "model", active=3
    )
    ids = np.arange(24).reshape(2, 12)
    np.testing.assert_allclose(
        load(model.path).logits(ids), load(anchor32).logits(ids), rtol=1e-4, atol=1e-4
    )
    joint = run_config("joint", prepared["code"], "train.steps=3", f"train.init={model.path}")
    pretrain(joint, tmp_path / "joint")
    trained = flatten(load(tmp_path / "joint").params)
    assert trained["experts/gate"].shape[1] == 3
    assert not np.array_equal(trained["experts/gate"][:, 0], trained["experts/gate"][:, 1])


def test_a_mixture_of_dense_models_has_their_ffns_and_the_mean_of_the_rest(
    anchor32, prepared, tmp_path
):
    pretrain(
        run_config("anchor", prepared["code"], f"train.init={anchor32}", "train.steps=2"),
        tmp_path / "code",
    )
    sources = {"anchor": anchor32, "code": tmp_path / "code"}
    mixed = flatten(assemble(sources, tmp_path / "model", active=1).params())
    each = [flatten(open_artifact(path).params()) for path in sources.values()]
    for path, array in mixed.items():
        own = [np.asarray(a[path], np.float32) for a in each]
        if path in ("experts/gate", "experts/up", "experts/down"):
            np.testing.assert_array_equal(array, np.concatenate(own, axis=1))
        elif path != "experts/row":
            np.testing.assert_allclose(array, (own[0] + own[1]) / 2, rtol=1e-6, atol=1e-7)
    assert mixed["experts/row"].shape == (2, 2, 32) and not np.array_equal(
        mixed["experts/row"][:, 0], each[0]["experts/row"][:, 0]
    )


def test_models_that_do_not_fit_together_are_refused(anchor32, model, prepared, tmp_path):
    with pytest.raises(UserError, match="expected a dense model"):
        assemble({"anchor": anchor32, "a": model}, tmp_path / "no", active=1)
    pretrain(
        run_config("anchor", prepared["public"], "train.steps=1", "model.d_ffn=32"),
        tmp_path / "other",
    )
    with pytest.raises(UserError, match="do not fit together"):
        assemble({"anchor": anchor32, "a": tmp_path / "other"}, tmp_path / "no", active=1)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("times", [1, 2])
def test_joint_steps_of_equal_flops_are_the_pairs_within_two_percent(
    times, anchor32, prepared, model
):
    config = open_artifact(anchor32).config
    pair = pair_config(anchor32, prepared["code"], "code", "train.steps=350")
    spent = times * 3 * pair.train.steps * step_flops(pair, config).model
    joint = run_config(
        "joint",
        prepared["code"],
        "model.n_experts=4",
        "model.n_active=2",
        f"model.vocab_size={config.vocab_size}",
    )
    steps = steps_of_flops(spent, joint)
    assert abs(steps * step_flops(joint, joint.model).model / spent - 1) < 0.02
    assert steps_of_flops(1, joint) == 1


def test_a_mixed_document_is_half_of_each_and_one_document(prepared, tiny_tokenizer):
    sources = [open_records(prepared[domain], "train") for domain in ("code", "law")]
    mixed = mixed_documents(sources[0], sources[1], tiny_tokenizer, count=5)
    assert len(mixed) == 5
    for i, record in enumerate(mixed):
        assert (
            record["tokens"].shape == record["segments"].shape == (SEQ_LEN,)
            and (record["segments"] == 1).all()
        )
        assert tiny_tokenizer.eos_id not in record["tokens"]
        halves = [tiny_tokenizer.decode(half.tolist()) for half in np.split(record["tokens"], 2)]
        assert (
            any(word in halves[0] for word in ("returns", "raises", "yields", "asserts", "code"))
            or i
        )
        text = sources[0][i]
        assert (
            halves[0].startswith(
                tiny_tokenizer.decode(text["tokens"][text["segments"] == 1][:5].tolist())
            )
            or i
        )
    assert mixed_documents(sources[0], sources[1], tiny_tokenizer, count=10**6)
