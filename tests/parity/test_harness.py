"""Our tasks through EleutherAI's harness, where it is installed (the extra `eval`): the same
figures."""

import types

import numpy as np
import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.predictors import OfModel
from flexolmo_jax.evals.tasks import Request, Task, evaluate_tasks
from flexolmo_jax.loaded import load

pytestmark = pytest.mark.parity
harness = pytest.importorskip("lm_eval") and pytest.importorskip("flexolmo_jax.evals.harness")
CHOICES = [" the river", " two bridges", " a farmer remembers the winter", " the old mill"]


@pytest.fixture
def task() -> Task:
    rng = np.random.default_rng(0)
    subjects = ["what feeds the valley", "who crosses the river", "what paints the winter"]
    contexts = [f"Question {d}: {rng.choice(subjects)}?\nAnswer:" for d in range(12)]
    return Task(
        "subjects",
        "acc",
        [
            Request(d, c, contexts[d], text, d % 4)
            for d in range(12)
            for c, text in enumerate(CHOICES)
        ],
    )


def test_the_harness_gives_the_same_accuracies(model, task, tmp_path):
    loaded = load(model)
    found = harness.evaluate_through_harness(
        harness.harness_model(loaded, batch_size=5), [task], tmp_path
    )["subjects"]
    ours = {
        metric: evaluate_tasks(
            OfModel(loaded), loaded.tokenizer, 64, [task._replace(metric=metric)]
        )["subjects"]
        for metric in ("acc", "len_norm")
    }
    assert found["acc"] == pytest.approx(ours["acc"]["acc"])
    # the harness's is by characters too
    assert found["acc_norm"] == pytest.approx(ours["len_norm"]["len_norm"])


def test_a_rolling_likelihood_has_every_token_once_and_generation_stops_where_it_is_told(model):
    loaded = load(model)
    lm = harness.harness_model(loaded)
    text = "the farmer feeds the valley. " * 12
    ids = [loaded.tokenizer.eos_id, *loaded.tokenizer.encode(text)]
    (total,) = lm.loglikelihood_rolling([types.SimpleNamespace(args=(text,))])
    context, expected = loaded.config.max_seq_len, 0.0
    assert len(ids) > context + 2
    for start in range(0, len(ids) - 1, context):
        end = min(start + context, len(ids) - 1)
        window = ids[max(0, end - context) : end + 1]
        logits = loaded.logits(np.array([window[:-1]]))[0].astype(np.float64)
        log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        expected += sum(
            log_p[i - 1, window[i]] for i in range(len(window) - (end - start), len(window))
        )
    assert total == pytest.approx(expected, rel=1e-4)
    (whole,) = lm.generate_until([types.SimpleNamespace(args=("the river", {"max_gen_toks": 12}))])
    (cut,) = lm.generate_until(
        [types.SimpleNamespace(args=("the river", {"max_gen_toks": 12, "until": [whole[3]]}))]
    )
    assert cut == whole.split(whole[3])[0]
    best = int(loaded.generate([loaded.tokenizer.encode("the river")], 1)[0][0])
    other = next(
        i
        for i in range(256, 300)
        if i != best and loaded.tokenizer.encode(loaded.tokenizer.decode([i])) == [i]
    )
    assert loaded.tokenizer.encode(loaded.tokenizer.decode([best])) == [best]
    likeliest = [
        lm.loglikelihood([types.SimpleNamespace(args=("the river", loaded.tokenizer.decode([i])))])[
            0
        ][1]
        for i in (best, other)
    ]
    assert likeliest == [True, False]


def test_what_the_harness_cannot_say_is_refused(task, tmp_path, model):
    with pytest.raises(UserError, match="no multiple choice after one context"):
        harness.evaluate_through_harness(
            harness.harness_model(load(model)), [task._replace(metric="bpb")], tmp_path
        )
