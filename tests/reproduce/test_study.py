"""A whole study in miniature: every cell, table and report; and the same table after kills."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexolmo_jax.data.documents import digest_of, is_heldout, read_documents
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.data.records import open_records
from flexolmo_jax.data.tokenizer import train_tokenizer
from flexolmo_jax.errors import RunError, UserError
from flexolmo_jax.reproduce.cells import cells, check_sources
from flexolmo_jax.reproduce.orderings import AVERAGE, PRIVATE, orderings
from flexolmo_jax.reproduce.overlap import overlaps
from flexolmo_jax.reproduce.results import write_results
from flexolmo_jax.reproduce.running import SECONDS, Cell, run_cells, seconds_of
from flexolmo_jax.reproduce.scores import heldout
from flexolmo_jax.reproduce.spec import Spec, load_spec
from flexolmo_jax.reproduce.study import reproduce
from flexolmo_jax.reproduce.trial import Trial
from flexolmo_jax.runtime.progress import note_once
from tests.tiny import MODEL, SEQ_LEN, documents, write_jsonl

ROOT = Path(__file__).parents[2]
# what a study on an open anchor has no need of
OPTIONAL = (
    *("model", "vocab_size", "anchor", "joint", "btx", "router", "overfit"),
    *("ablations", "tuned_ablations"),
)
DOMAINS = ("code", "law")
RUN = {
    "data": {"batch_size": 8},
    "train": {"steps": 4, "log_every": 2, "eval_records": 4},
    "optim": {"lr": 3e-3, "warmup": 1},
    "mesh": {"fsdp": 1},
}
SPEC = {
    "title": "A study in miniature",
    "domains": list(DOMAINS),
    "max_mb": 1,
    "vocab_size": 320,
    "seq_len": 32,
    "seeds": 1,
    "workers": 2,
    "heldout_records": 4,
    "mixed_documents": 2,
    "proxy_share": 0.2,
    "proxy_diversity": 2,
    "extraction_documents": 3,
    "extraction_prefix": 4,
    "extraction_tokens": 8,
    "model": MODEL,
    **{name: RUN for name in ("anchor", "pair", "dense", "joint", "btx", "router")},
    "overfit": RUN | {"data": {"batch_size": 1}},
    "ablations": {
        "without bias": {"model.router_bias": False},
        "without coordination": {"pair.beside_anchor": False},
    },
    "tuned_ablations": ["without coordination"],
}


def a_study(root: Path, **changes) -> Path:
    """A directory that holds a study whose text is there already: made up, for no network is asked
    for any."""
    (root / "text").mkdir(parents=True)
    for name in ("public", *DOMAINS):
        write_jsonl(root / "text" / f"{name}.jsonl", documents(name, 160))
    (root / "text.json").write_text("{}")
    (root / "spec.yaml").write_text(json.dumps(SPEC | changes))
    return root


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    root = a_study(tmp_path_factory.mktemp("study") / "study")
    spec = load_spec(root / "spec.yaml")
    for name, cell in cells(spec, root).items():
        if not cell.is_done:
            cell.do()
            assert cell.is_done, name
    (root / "seconds.jsonl").write_text('{"cell": "all", "seconds": 1.0}\n')
    write_results(spec, root)
    return root


def results_of(root: Path) -> dict:
    return json.loads((root / "results.json").read_text())


def test_every_line_has_a_figure_in_every_column(study):
    lines = results_of(study)["rows"]
    assert {
        "anchor", "anchor+public", "pair:code", "dense:law", "soup", "weighted soup", "BTM",
        "BTM:top1", "BTM:top2", "prompt routing",
        "BTX", "joint 1x", "joint 2x", "merged", "merged+tuned", "merged:k=1", "merged:k=2",
        "merged+tuned:k=1", "merged-code",
        "merged-law", "merged:experts=1", "without bias", "without coordination",
        "without coordination+tuned",
    } <= lines.keys()  # fmt: skip
    for name, columns in lines.items():
        assert columns.keys() == {"public", *DOMAINS, "mixed", PRIVATE, AVERAGE}, name
        for figure in columns.values():
            assert 1 < figure["mean"] < 10 and figure["spread"] is None and figure["seeds"] == 1, (
                name
            )
        assert columns[PRIVATE]["mean"] == pytest.approx(
            (columns["code"]["mean"] + columns["law"]["mean"]) / 2
        )


def test_masked_models_are_smaller_merges_and_joint_runs_take_the_flops_of_all_pairs(study):
    results = results_of(study)
    lines = results["rows"]
    assert lines["merged:experts=1"]["code"] == lines["merged-law"]["code"]
    for times in (1, 2):
        # of few steps; whole studies: below
        assert abs(results["flops"][f"flops-{times}x"]["joint_of_pairs"] / times - 1) < 0.2


def test_records_that_are_scored_come_from_all_of_a_source(study):
    trial = Trial(load_spec(study / "spec.yaml"), study, 0)
    source = open_records(trial.data("public"), "heldout")
    scored = heldout(trial)["public"]
    places = [
        next(i for i in range(len(source)) if (source[i]["tokens"] == record["tokens"]).all())
        for record in scored
    ]
    assert len(source) >= 8 and places == [i * len(source) // 4 for i in range(4)]


def test_a_column_without_held_out_text_is_refused_and_a_part_is_told(
    anchor, prepared, tiny_tokenizer, tmp_path, capfd
):
    note_once.cache_clear()
    trial = Trial(Spec(domains=("code", "law"), heldout_records=2), tmp_path, 0)
    trial.anchor = anchor
    for name in ("public", "code"):
        shutil.copytree(prepared[name], tmp_path / "data" / name)
    source = write_jsonl(tmp_path / "law.jsonl", documents("law", 20))
    prepare([source], tiny_tokenizer, SEQ_LEN, tmp_path / "data" / "law", heldout=0)
    with pytest.raises(UserError, match=r"^of law, mixed there is no held-out text to score"):
        heldout(trial)
    assert "public: 2 of " in capfd.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "reproduce").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_studies_are_whole_and_joint_runs_take_the_flops_of_all_pairs_within_two_percent(
    path, tmp_path
):
    spec = load_spec(path)
    trial = Trial(spec, tmp_path, 0)
    sources = [{"path": "data"}]
    assert (
        cells(spec, tmp_path)
        and trial.continued("public")
        and trial.btx()
        and spec.run("anchor", spec.overfit, sources, 0)
    )
    assert all(trial.pair(domain, {}).pair for domain in spec.domains)
    if spec.open_anchor:
        assert not (spec.joint or spec.btx or spec.router or spec.overfit)
        return
    spec.run("router", spec.router, sources, 0, **{"router.model": "merged"})
    anchor = spec.run("anchor", {"model": spec.model, **spec.anchor}, sources, 0).model
    anchor = dataclasses.replace(anchor, vocab_size=spec.vocab_size)
    for overrides in ({}, *spec.ablations.values()):
        assert all(trial.pair(domain, overrides).pair for domain in spec.domains)
    mixture = dataclasses.replace(anchor, n_experts=len(spec.domains) + 1, n_active=trial.active)
    for times in (1, 2):
        _, report = trial.joint_of(times, anchor, mixture)
        assert abs(report["joint_of_pairs"] / times - 1) < 0.02


def test_nothing_that_is_held_out_is_learnt_from(study):
    held_out = {
        digest_of(text)
        for path in (study / "text").iterdir()
        for text in read_documents(path)
        if is_heldout(digest_of(text))
    }
    chosen = {
        digest_of(text)
        for domain in DOMAINS
        for text in read_documents(study / "seed0" / f"proxies-{domain}.jsonl")
    }
    public = {digest_of(text) for text in read_documents(study / "text" / "public.jsonl")}
    assert held_out and chosen and not held_out & chosen and chosen <= public
    overlap = results_of(study)["heldout"]
    assert overlap["code"]["documents"] > 0 and 0 <= overlap["code"]["share_in_training_text"] <= 1


def test_the_attack_is_on_documents_that_were_trained_on_and_nothing_else_is_learnt_by_heart(study):
    attack = results_of(study)["extraction"]
    assert attack.keys() == {
        "anchor",
        "dense:code",
        "pair:code",
        "merged",
        "merged-code",
        "overfit",
    }
    assert all(
        one["documents"] == 3 and one["low"] <= one["rate"] <= one["high"]
        for one in attack.values()
    )
    trained_on = [
        text
        for text in read_documents(study / "text" / "code.jsonl")
        if not is_heldout(digest_of(text))
    ]
    for text in read_documents(study / "seed0" / "attacked.jsonl"):
        assert any(document.startswith(text) for document in trained_on)


def test_the_reports_stand_alone_and_say_what_holds(study):
    results, html = results_of(study), (study / "report.html").read_text()
    assert (
        not re.search(r"(src|href)=|url\(", html)
        and "Opting out" in html
        and html.count("<svg") > 10
    )
    markdown = (study / "results.md").read_text()
    for name, ordering in results["orderings"].items():
        assert f"| {name} | {'yes' if ordering['holds'] else 'no'} |" in markdown
        assert (ordering["seeds"], ordering["seeds_where_it_holds"]) == (1, ordering["holds"]), name
    assert results["hardware"] and re.fullmatch(r"\d{4}-\d\d-\d\d", results["date"])


def test_orderings_are_those_of_the_figures():
    spec = load_spec(ROOT / "configs" / "reproduce" / "cpu.yaml")
    columns = ("public", *spec.domains, PRIVATE, AVERAGE, "mixed")

    def line(figure: float) -> dict[str, float]:
        return dict.fromkeys(columns, figure)

    names = [
        "anchor",
        "anchor+public",
        "soup",
        "weighted soup",
        "BTM:top2",
        "prompt routing",
        "BTX",
        "joint 1x",
        "joint 2x",
    ]
    names += [f"merged:k={k}" for k in range(1, 5)] + [
        f"merged-{domain}" for domain in spec.domains
    ]
    means = {name: line(2.0) for name in names} | {"merged": line(1.8), "merged+tuned": line(1.5)}
    means["merged:k=1"] = line(2.5)
    means["merged-math"]["math"] = 4.0
    found = {one.name: one for one in orderings(spec, means, means | {"without bias": line(1.7)})}
    assert found["merged beats the anchor on private domains"].margin == pytest.approx(0.1)
    assert found["merged and tuned beats the anchor by 20 % on private domains"].holds
    assert not found["the joint model of twice the FLOPs wins"].holds
    assert not found["the routers' bias helps"].holds and found[
        "the routers' bias helps"
    ].margin == pytest.approx(1 - 1.8 / 1.7)
    assert (
        found["public contrast helps"].margin is None and not found["public contrast helps"].holds
    )
    assert found["one active expert is worst"].holds
    of_math = next(one for name, one in found.items() if name.startswith("opting math out"))
    assert of_math.holds and of_math.margin == pytest.approx(4.0 / 1.8 - 2.0 / 1.8)


def test_a_held_out_document_that_is_trained_on_ends_the_study(tmp_path):
    held_out = next(
        text for i in range(1000) if is_heldout(digest_of(text := f"{i} " + "word " * 20))
    )
    text = {
        "public": write_jsonl(tmp_path / "public.jsonl", ["some text " * 10]),
        "code": write_jsonl(tmp_path / "code.jsonl", [held_out]),
    }
    found = overlaps([text["public"]], text, ["code"])["code"]
    assert found == {"documents": 1, "runs": 9, "share_in_training_text": 0.0}
    write_jsonl(tmp_path / "public.jsonl", [f"{held_out} and more"])
    assert overlaps([text["public"]], text, ["code"])["code"]["share_in_training_text"] == 1.0


def test_studies_that_are_none_are_refused(tmp_path):
    for changes, message in (
        ({"domains": ["code"]}, "expected two or more private domains"),
        ({"domains": ["code", "code"]}, "all different"),
        ({"domains": ["code", "Code"]}, "'code' and 'Code', one name where capitals"),
        ({"ablations": {"a": {}, "A": {}}}, "ablations have 'a' and 'A', one name"),
        ({"seeds": 0}, "seeds is 0"),
        (
            {"ablations": {}},
            "tuned_ablations has without coordination; expected some of no ablations",
        ),
        ({"sedes": 1}, "did you mean 'seeds'"),
        ({"domains": "code"}, "expected a list"),
    ):
        path = tmp_path / "spec.yaml"
        path.write_text(json.dumps(SPEC | changes))
        with pytest.raises(UserError, match=message):
            load_spec(path)
    (tmp_path / "years").mkdir()
    (tmp_path / "years" / "thesis.txt").touch()
    path.write_text(json.dumps(SPEC))
    with pytest.raises(UserError, match=r"holds thesis\.txt, but no study"):
        reproduce(path, tmp_path / "years")
    (tmp_path / "other.yaml").write_text(json.dumps(SPEC | {"seq_len": 64}))
    with pytest.raises(UserError, match="holds another study"):
        reproduce(tmp_path / "other.yaml", a_study(tmp_path / "study"))


@pytest.mark.parametrize("what", ["text", "tokenizer"])
def test_a_study_of_other_text_does_not_go_on(tmp_path, what):
    root = a_study(tmp_path / "study")
    steps = cells(load_spec(root / "spec.yaml"), root)
    for name in ("tokenizer", "data-public", "data-code"):
        steps[name].do()
    check_sources(load_spec(root / "spec.yaml"), root)
    told = r"data/code was made from other text \(edited: code\.jsonl\)"
    if what == "text":
        write_jsonl(root / "text" / "code.jsonl", documents("code", 161))
    else:
        (root / "tokenizer.json").unlink()
        train_tokenizer([root / "text" / "law.jsonl"], 300, root / "tokenizer.json")
        told = r"data/public was made from other text \(another \S+tokenizer\.json\)"
    with pytest.raises(UserError, match=told):
        reproduce(root / "spec.yaml", root)
    assert not (root / "logs").exists()


def test_a_study_leaves_out_what_it_has_no_section_for(tmp_path):
    small = {key: value for key, value in SPEC.items() if key not in OPTIONAL}
    root = a_study(tmp_path / "study")
    (root / "spec.yaml").write_text(json.dumps(small | {"open_anchor": "smollm2-135m"}))
    spec = load_spec(root / "spec.yaml")
    steps = cells(spec, root)
    assert str(steps["anchor"].do) == f"flexolmo anchor fetch smollm2-135m {root / 'anchor'}"
    unwanted = ("tokenizer", "anchor-run", "tuned", "proxies", "joint", "btx", "overfit", "extrac")
    assert not [name for name in steps if any(part in name for part in unwanted)]
    assert all(need in steps for step in steps.values() for need in step.needs)
    names = ("merged", "merged:k=1", "merged:k=2", "merged-code", "merged-law")
    columns = ("public", *DOMAINS, PRIVATE, AVERAGE, "mixed")
    means: dict[str, dict[str, float]] = {name: dict.fromkeys(columns, 2.0) for name in names}
    claims = [one.name for one in orderings(spec, means, means)]
    assert not [name for name in claims if "tun" in name or "joint" in name or "BTX" in name]
    for changes, told in (
        ({"anchor": RUN}, "anchor has no effect beside open_anchor"),
        ({"model": MODEL}, "model has no effect beside open_anchor"),
        ({"ablations": {"a": {}}, "tuned_ablations": ["a"]}, "needs the section router"),
    ):
        path = tmp_path / "bad.yaml"
        path.write_text(json.dumps(small | {"open_anchor": "smollm2-135m"} | changes))
        with pytest.raises(UserError, match=told):
            load_spec(path)


@pytest.mark.slow
def test_a_study_on_an_open_anchor_runs_to_its_report(tmp_path, anchor):
    small = {key: value for key, value in SPEC.items() if key not in OPTIONAL}
    root = a_study(tmp_path / "study")
    content = json.dumps(small | {"open_anchor": "smollm2-135m"})
    (root / "spec.yaml").write_text(content)
    shutil.copytree(anchor, root / "anchor")
    results = reproduce(root / "spec.yaml", root)
    lines = {"anchor", "anchor+public", "pair:code", "dense:law", "soup", "BTM:switching", "merged"}
    assert lines <= results["rows"].keys()
    assert not {"joint 1x", "BTX", "merged+tuned"} & results["rows"].keys()
    assert all(one["margin"] is not None for one in results["orderings"].values())
    assert not results["extraction"] and (root / "report.html").is_file()


def test_a_cell_that_fails_ends_the_study_with_its_last_line(tmp_path):
    root = a_study(tmp_path / "study")
    (root / "text" / "public.jsonl").write_text("no json\n")
    with pytest.raises(
        RunError, match=r"(tokenizer|overlap) ended with status 1: .*line 1: not JSON.*logs/\1\.log"
    ):
        reproduce(root / "spec.yaml", root)
    with pytest.raises(RunError, match="waits for what no cell makes: b"):
        waiting = {"a": Cell(root / "a", ("b",), print), "b": Cell(root / "b", ("a",), print)}
        run_cells(waiting, root, 1, "no program is started")


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_cells_share_the_cores_of_a_cpu_and_take_turns_on_an_accelerator(
    platform, tmp_path, monkeypatch, capsys
):
    (tmp_path / "modules" / "jax").mkdir(parents=True)
    fake = f"def default_backend():\n    return {platform!r}\n"
    (tmp_path / "modules" / "jax" / "__init__.py").write_text(fake)
    program = """
import json, os, sys, time
from pathlib import Path
start = time.monotonic()
time.sleep(4)
told = [start, time.monotonic(), os.environ.get("XLA_FLAGS", "")]
Path(sys.argv[1], sys.argv[2]).write_text(json.dumps(told))
"""
    (tmp_path / "modules" / "a_program.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    root = tmp_path / "root"
    root.mkdir()
    steps = {name: Cell(root / name, (), print) for name in ("a", "b")}
    run_cells(steps, root, 2, "a_program")
    first, second = sorted(json.loads((root / name).read_text()) for name in steps)
    took_turns = first[1] < second[0]
    assert took_turns == (platform == "tpu")
    assert ("multi_thread_eigen=false" in first[2]) == (platform == "cpu")
    told = "one cell at a time, as they share the tpu" in capsys.readouterr().err
    assert told == (platform == "tpu")


def test_a_damaged_log_of_seconds_ends_no_study(tmp_path):
    assert seconds_of(tmp_path) == {}
    entry = b'{"cell": "anchor", "seconds": 3.5}\n'
    (tmp_path / SECONDS).write_bytes(b"\0\0\0\n" + entry + b'[]\n{"cell": "cut')
    assert seconds_of(tmp_path) == {"anchor": 3.5}


@pytest.mark.slow
def test_a_study_that_is_killed_again_and_again_ends_with_the_same_table(tmp_path):
    whole = a_study(tmp_path / "whole", ablations={}, tuned_ablations=[])
    reproduce(whole / "spec.yaml", whole)
    killed, kills = a_study(tmp_path / "killed", ablations={}, tuned_ablations=[]), random.Random(0)
    command = [
        sys.executable,
        "-m",
        "flexolmo_jax.cli",
        "reproduce",
        str(killed / "spec.yaml"),
        "--out",
        str(killed),
    ]
    for attempt in range(100):
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            try:
                _, errors = process.communicate(
                    timeout=kills.uniform(8, 40) if attempt < 6 else 900
                )
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                time.sleep(1)  # its cells end when they see it
                continue
        assert process.returncode == 0, errors.decode()[-2000:]
        break
    assert attempt >= 3
    assert results_of(killed)["rows"] == results_of(whole)["rows"]
    assert results_of(killed)["orderings"] == results_of(whole)["orderings"]
