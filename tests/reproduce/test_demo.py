"""The demo on an open model, in miniature: its commands, its table and its claims."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from flexolmo_jax.cli.command import PARSER
from flexolmo_jax.data.prepare import prepare
from flexolmo_jax.errors import RunError, UserError
from flexolmo_jax.reproduce.demo.results import Change, claims, left_exactly, lines
from flexolmo_jax.reproduce.demo.run import cells, run_demo
from flexolmo_jax.reproduce.demo.spec import CONTROL, Demo, Places, parse_demo, read_demo
from tests.tiny import SEQ_LEN, documents, write_jsonl

RUN = {
    "data": {"batch_size": 8},
    "train": {"steps": 8, "eval_records": 4},
    "optim": {"lr": 3e-3, "warmup": 1},
    "mesh": {"fsdp": 1},
    "pair": {"public_share": 0.4, "contrast": 1.0},
}
SPEC = {
    "anchor": "tiny",
    "domains": ["code", "law"],
    "seq_len": SEQ_LEN,
    "records": 4,
    "prompt": 8,
    "answer": 8,
    "pair": RUN,
}


def test_every_step_is_a_command_that_there_is(tmp_path):
    spec, places = parse_demo(read_demo("smollm2")), Places(tmp_path / "a folder")
    assert [*cells(spec, places)] == ["text"]
    for domain in (*spec.domains[1:], spec.public):  # the first could not be had
        places.documents(domain).parent.mkdir(parents=True, exist_ok=True)
        places.documents(domain).touch()
    steps = cells(spec, places)
    experts = [name for name in steps if name.startswith("expert-")]
    assert experts == [f"expert-{domain}" for domain in spec.domains[1:5]]
    for step in steps.values():
        assert all(need in steps for need in step.needs)
        if words := shlex.split(str(step.do))[1:] if str(step.do).startswith("flexolmo ") else ():
            assert PARSER.parse_args(words).run_verb
    typed = [str(step.do) for step in steps.values()]
    for verb in ("anchor fetch", "contribute", "merge", "opt-out"):
        assert any(line.startswith(f"flexolmo {verb} ") for line in typed), verb
    with pytest.raises(UserError, match="got 'gpt'; expected one of smollm2"):
        read_demo("gpt")
    for domain in spec.domains[2:]:
        places.documents(domain).unlink()
    with pytest.raises(UserError, match=f"text of {spec.domains[1]} could be had; expected two"):
        cells(spec, places)


def figures(spec: Demo, bits: dict[str, dict[str, float]]) -> dict:
    """Of lines whose records all cost so many bits of 100 bytes; 100 where nothing is said."""
    return {
        line.name: {
            column: {"by_record": [[bits.get(line.name, {}).get(column, 100.0), 100.0]] * 4}
            for column in line.columns
        }
        for line in lines(spec, Places(Path()))
    }


def test_claims_are_what_the_figures_say():
    spec = Demo(domains=("code", "law", "care", "math"))
    won = dict.fromkeys(spec.domains, 80.0)
    pairs = {f"pair:{name}": {name: 79.0} for name in spec.domains}
    good = {"merged": won | {"public": 99.0}, "merged-math": won | {"math": 97.0, "public": 99.0}}
    assert all(check.holds for check in claims(spec, figures(spec, pairs | good)))

    def failing(**changes: dict[str, float]) -> list[str]:
        by_line = {name.replace("_", "-"): of_line for name, of_line in changes.items()}
        bits = pairs | {name: line | by_line.pop(name, {}) for name, line in good.items()} | by_line
        return [c.claim for c in claims(spec, figures(spec, bits)) if not c.holds]

    assert failing(merged={"law": 95.0}, merged_math={"law": 95.0}) == [
        "law: merged is within 3 % of its owner's pair"
    ]
    assert failing(control={"law": 79.0}) == ["law: merged beats the anchor and the control"]
    less = failing(control={"law": 85.0, "code": 85.0})
    assert less == ["on all private domains, or all but one, it is by 10 % or more"]
    worse = failing(merged={"public": 100.5}, merged_math={"public": 100.5})
    assert worse == ["merged is no worse than the anchor on public text"]
    stays = failing(merged_math={"math": 80.0})
    assert stays == ["math: without its expert its text costs more"]
    moved = failing(merged_math={"law": 83.0})
    assert moved == ["math: without its expert everything else moves by less than 3 %"]


def test_a_change_is_of_all_bits_and_its_interval_is_of_the_records():
    rng = np.random.default_rng(0)
    bytes_of = np.full(200, 1000.0)
    other = np.stack([rng.uniform(500, 1500, 200), bytes_of], axis=1)
    noise = rng.normal(0, 0.1, 200)
    model = np.stack([other[:, 0] * (0.8 + noise), bytes_of], axis=1)
    change = Change.of(model, other)
    assert change.mean == pytest.approx(model[:, 0].sum() / other[:, 0].sum() - 1)
    # of the mean of 200 ratios of this deviation, weighted by bits
    half = 1.96 * 0.1 / np.sqrt(200)
    assert change.high - change.low == pytest.approx(2 * half, rel=0.2)
    assert change.low < change.mean < change.high
    assert str(Change.of(other, other)) == "+0.0% (+0.0% to +0.0%)"


def test_a_demo_stands_alone_in_its_folder(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match=r"holds thesis\.txt, but no demo"):
        run_demo(json.dumps(SPEC), tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "demo.yaml").write_text(json.dumps(SPEC | {"records": 5}))
    with pytest.raises(UserError, match="holds another demo"):
        run_demo(json.dumps(SPEC), tmp_path / "other")


def test_a_demo_of_other_text_does_not_go_on(tmp_path, tiny_tokenizer):
    places = Places(tmp_path)
    places.documents("law").parent.mkdir()
    for name in ("code", "law", "public"):
        write_jsonl(places.documents(name), documents(name, 40))
    places.spec.write_text(json.dumps(SPEC))
    prepare([places.documents("law")], tiny_tokenizer, SEQ_LEN, places.data("law"))
    write_jsonl(places.documents("law"), documents("law", 41))
    told = r"law\.work/data was made from other documents than \S+ \(edited: law\.jsonl\)"
    with pytest.raises(UserError, match=told):
        run_demo(json.dumps(SPEC), tmp_path)


@pytest.mark.slow
def test_a_demo_runs_to_its_report_and_goes_on_after_a_failure(tmp_path, anchor, corpora):
    root = tmp_path / "demo"
    places = Places(root)
    places.documents("law").parent.mkdir(parents=True)
    for name in ("public", "code", "law"):
        shutil.copy(corpora[name], places.documents(name))
    places.spec.write_text(json.dumps(SPEC))
    with pytest.raises(RunError, match=r"anchor ended with status 2: got 'tiny'; expected one of"):
        run_demo(json.dumps(SPEC), root)
    shutil.copytree(anchor, places.anchor)
    results = run_demo(json.dumps(SPEC), root)
    assert set(results["rows"]) == {
        *("anchor", CONTROL, "pair:code", "pair:law", "merged", "merged:k=3", "merged-law"),
    }
    rows = results["rows"]
    for name in ("code", "law"):
        assert rows[f"pair:{name}"][name] < rows["anchor"][name]
    assert set(rows["pair:code"]) == {"public", "code"}
    assert results["claims"]["opting law out gives exactly the model that never had it"]
    assert "95 % intervals" in (root / "results.txt").read_text()
    assert "the document" in places.report.read_text()
    # what nothing asks for is not done again
    before = (root / "seconds.jsonl").read_text()
    assert run_demo(json.dumps(SPEC), root) == results
    assert (root / "seconds.jsonl").read_text() == before
    arrays = (file for file in places.without("law").rglob("*") if file.is_file())
    array = next(file for file in arrays if "c" in file.parts)
    content = array.read_bytes()
    array.unlink()  # other models may have links to it
    array.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not left_exactly(places.without("law"), places.never("law"), "law").holds
