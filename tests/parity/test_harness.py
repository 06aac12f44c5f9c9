"""Our tasks through EleutherAI's harness, where it is installed (the extra `eval`): the same
figures."""

import dataclasses
import json
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from flexolmo_jax.convert.exporting import export_hf
from flexolmo_jax.convert.importing import import_hf
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.predictors import OfModel
from flexolmo_jax.evals.tasks import Request, Task, evaluate_tasks
from flexolmo_jax.loaded import load
from tests.chats import FORMS, write_instruct
from tests.convert.conftest import MOE, write_checkpoint

pytestmark = pytest.mark.parity
lm_eval = pytest.importorskip("lm_eval")
harness = pytest.importorskip("flexolmo_jax.evals.harness")
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


@pytest.fixture(scope="module", params=["llama 3", "chatml", None])
def both(request, tiny, tiny_tokenizer):
    """A model and its export through the harness's own backend: with a BOS, with none, and without
    a chat."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    name, special = request.param, FORMS[request.param].special if request.param else ()
    # the backend may choose ids that no token has
    size = tiny_tokenizer.vocab_size + len(special)
    config = dataclasses.replace(MOE, init_std=0.3, vocab_size=size)
    source = tiny / f"harness-{name}"
    if name is None:
        write_checkpoint(source, config, np.float32, tiny_tokenizer)
    else:
        write_instruct(source, name, config, tiny / "tokenizer.json")
        ids = {t.content: i for i, t in Tokenizer.load(source).added_tokens.items()}
        ends = {"eos_token_id": [ids[end] for end in FORMS[name].ends]}
        (source / "generation_config.json").write_text(json.dumps(ends))
    made = import_hf(source, tiny / f"harness-{name}-model").path
    export_hf(made, tiny / f"harness-{name}-export")
    theirs = huggingface.HFLM(
        pretrained=str(tiny / f"harness-{name}-export"),
        device="cpu",
        dtype="float32",
        experts_implementation="eager",
    )
    return harness.harness_model(load(made), batch_size=4), theirs


def ask(kind: str, lm: Any, requests: Sequence[Any]) -> list[Any]:
    asked = [types.SimpleNamespace(args=one, task_name="a task") for one in requests]
    return getattr(lm, kind)(asked)


def test_likelihoods_are_those_of_the_hf_backend(both):
    _, theirs = both
    special = theirs.tokenizer.eos_token
    requests = [
        ("the river", " feeds the valley"),
        ("the river ", "feeds"),
        ("the river  \n", " a farmer"),
        ("", " our village"),
        ("", f"{theirs.tokenizer.decode([theirs.prefix_token_id])}the river"),
        (f"a farmer{special}the", " winter"),
        (f"{special}the old mill", " paints"),
        (f"{theirs.tokenizer.bos_token or special}the", " mill"),
        ("the old mill " * 40, " crosses two bridges"),
        ("the old mill " * 40, "crosses two bridges" * 3),
        ("é", "ü ☃"),
        ("the rive", "r feeds"),
        ("one ", "of"),
        ("one ", "two"),
    ]
    found, expected = (ask("loglikelihood", lm, requests) for lm in both)
    for request, (x, is_greedy), (y, best) in zip(requests, found, expected, strict=True):
        assert (x, is_greedy) == (pytest.approx(y, rel=1e-5), best), request
    texts = [("the farmer feeds the valley. " * n,) for n in (0, 1, 3, 12, 30)]
    texts += [(f"{special}the river",), ("the river ",)]
    found, expected = (ask("loglikelihood_rolling", lm, texts) for lm in both)
    assert found == pytest.approx(expected, rel=1e-5)


def test_completions_are_those_of_the_hf_backend(both):
    ours, theirs = both
    (whole,) = ask("generate_until", theirs, [("the river", {"max_gen_toks": 30})])
    middle = len(whole) // 2
    requests = [
        ("the river", {"max_gen_toks": 30, "until": [whole[middle : middle + 3]]}),
        ("the river", {"max_gen_toks": 30, "until": whole[middle]}),
        ("the river ", {"max_gen_toks": 12, "do_sample": False, "temperature": 0.7}),
        ("a farmer", {"max_new_tokens": 20, "until": ["."], "temperature": 0.0}),
        ("our village " * 30, {"max_gen_toks": 30}),
        (f"a{theirs.tokenizer.eos_token}", {"max_gen_toks": 9, "until": ["\n\n", "x"]}),
        *((" ".join(["the old mill"] * n), {"max_gen_toks": 20}) for n in range(1, 5)),
    ]
    found = ask("generate_until", ours, requests)
    for request, text in zip(requests, found, strict=True):
        assert [text] == ask("generate_until", theirs, [request]), request


def test_chats_and_kept_answers_go_through_the_harness(both, tmp_path):
    """Messages in turns, in one, and with the start of an answer given."""
    ours, theirs = both
    if theirs.tokenizer.chat_template is None:
        pytest.skip("it has no chat")
    documents = [{"q": f"Who feeds {n} rivers?", "a": ["a", "the"], "r": n % 2} for n in range(6)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    data = {"data_files": {"test": str(tmp_path / "d.jsonl")}}
    same = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    same |= {"fewshot_split": "test", "num_fewshot": 1, "doc_to_text": "{{q}}"}
    kinds: dict[str, dict[str, Any]] = {
        "choices": {"output_type": "multiple_choice", "doc_to_choice": "a", "doc_to_target": "r"},
        "texts": {"output_type": "generate_until", "doc_to_target": "x", "gen_prefix": "It is"},
    }
    kinds["texts"]["generation_kwargs"] = {"max_gen_toks": 6, "until": ["\n"]}
    for task, fields in kinds.items():
        (tmp_path / f"{task}.yaml").write_text(json.dumps(same | fields | {"task": task}))
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)

    def answers(lm: Any, **how: Any) -> Any:
        how |= {"task_manager": manager, "bootstrap_iters": 0, "apply_chat_template": True}
        found = lm_eval.simple_evaluate(lm, tasks=list(kinds), **how)["samples"]
        return {
            task: [(one["arguments"], one["filtered_resps"]) for one in found[task]]
            for task in kinds
        }

    for multiturn in (True, False):
        expected = answers(theirs, fewshot_as_multiturn=multiturn)
        found = answers(ours, fewshot_as_multiturn=multiturn)
        assert found["texts"] == expected["texts"]
        for (asked, got), (same_asked, wanted) in zip(
            found["choices"], expected["choices"], strict=True
        ):
            assert asked == same_asked
            assert [x for x, _ in got] == pytest.approx([x for x, _ in wanted], rel=1e-5)
            assert [best for _, best in got] == [best for _, best in wanted]
    kept = str(tmp_path / "kept")
    first = answers(ours, use_cache=kept, fewshot_as_multiturn=False)
    assert first == found == answers(ours, use_cache=kept, fewshot_as_multiturn=False)


def test_what_the_harness_cannot_say_is_refused(task, tmp_path, model):
    with pytest.raises(UserError, match="no multiple choice after one context"):
        harness.evaluate_through_harness(
            harness.harness_model(load(model)), [task._replace(metric="bpb")], tmp_path
        )
