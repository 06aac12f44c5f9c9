"""One line for every mistake on the command line, with status 2 and nothing left behind."""

import errno
import os
import shutil
from typing import Any

import pytest

from flexolmo_jax.cli import main
from flexolmo_jax.exchange.signature import keygen


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no text in"),
        (b'{"text": ""}\n', "no text in"),
        (b'{"text": "a"}\nno json\n', "documents.jsonl, line 2: not JSON"),
        (b'{"text": "a"}\n\n{"body": "b"}\n', 'documents.jsonl, line 3: the object has no "text"'),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "documents.jsonl, line 2: not UTF-8"),
    ],
    ids=["empty", "empty document", "not JSON", "no text", "not UTF-8"],
)
def test_documents_that_cannot_be_used_are_named(content, says, paths, tmp_path, fails):
    documents, out = tmp_path / "documents.jsonl", tmp_path / "out" / "it"
    documents.write_bytes(content)
    assert says in fails(
        "data",
        "prepare",
        "--input",
        documents,
        "--tokenizer",
        paths.anchor,
        "--seq-len",
        32,
        "--out",
        out,
    )
    assert says in fails(
        "tokenizer", "train", "--input", documents, "--vocab-size", 300, "--out", out
    )
    assert says in fails(
        "contribute",
        "--anchor",
        paths.anchor,
        "--documents",
        documents,
        "--name",
        "new",
        "--out",
        out,
    )
    assert says in fails("publish", paths.run, "--public", documents, "--out", out)
    assert says in fails("eval", paths.model, "--data", documents)


def test_a_corpus_smaller_than_a_batch_is_refused(paths, tmp_path, fails):
    line = fails(
        "train", paths.config, "--set", "data.batch_size=4096", "--out", tmp_path / "out" / "run"
    )
    assert "the corpus is smaller than a batch" in line and "batches of 4096" in line


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.larning_rate=1", "unknown config key 'optim.larning_rate'"),
        ("optim.warmpu=1", "did you mean 'optim.warmup'?"),
        ("optim.lr", "expected section.key=value"),
        (
            "model.preset=13b",
            "unknown model.preset '13b'; expected one of tiny, 1b, 7b, smollm2-135m",
        ),
        ("mesh={tensor: 3}", "does not divide 8 devices"),
        ("mesh={data: 4, fsdp: 4}", "needs 16 devices; got 8"),
        ("data.train=[{path: nowhere}]", "nowhere does not exist"),
        ("train.init=nowhere", "nowhere does not exist; expected a run, anchor or model"),
    ],
)
def test_a_config_that_cannot_run_is_refused_before_anything_is_written(
    override, says, paths, tmp_path, fails
):
    assert says in fails(
        "train", paths.config, "--set", override, "--out", tmp_path / "out" / "run"
    )


def test_a_missing_config_is_named(tmp_path, fails):
    assert "no config at" in fails(
        "train", tmp_path / "none.yaml", "--out", tmp_path / "out" / "run"
    )


def test_another_tokenizer_than_the_anchors_is_refused(paths, tmp_path, fails):
    other, data = tmp_path / "tokenizer.json", tmp_path / "data"
    assert (
        main(
            [
                "tokenizer",
                "train",
                "--input",
                str(paths.code),
                "--vocab-size",
                "280",
                "--out",
                str(other),
            ]
        )
        == 0
    )
    prepare = [
        "data",
        "prepare",
        "--input",
        str(paths.code),
        "--tokenizer",
        str(other),
        "--seq-len",
        "32",
        "--out",
        str(data),
    ]
    assert main(prepare) == 0
    pair = [
        "--set",
        "run=pair",
        "--set",
        f"pair={{anchor: {paths.anchor}, name: new}}",
        "--out",
        tmp_path / "out" / "run",
    ]
    assert "is not the tokenizer of" in fails(
        "train", paths.config, "--set", f"data.tokenizer={other}", *pair
    )
    assert "another tokenizer" in fails(
        "train", paths.config, "--set", f"data.train=[{{path: {data}}}]", *pair
    )
    assert "tokenizer" in fails("eval", paths.model, "--data", data)


def test_a_contribution_to_another_anchor_is_refused(paths, tmp_path, fails):
    other = paths.other_anchor
    assert "was made from the anchor" in fails(
        "merge", "--anchor", other, *paths.contributions, "--out", tmp_path / "out" / "model"
    )
    assert "was made from the anchor" in fails("verify", paths.contributions[0], "--anchor", other)
    assert "was made from the anchor" in fails("verify", paths.model, "--anchor", other)


@pytest.mark.parametrize("at", [0, 20, -1])
def test_a_contribution_with_a_changed_byte_is_refused(at, paths, tmp_path, fails):
    changed = shutil.copytree(paths.contributions[0], tmp_path / "changed")
    content = bytearray((changed / "expert.safetensors").read_bytes())
    content[at] ^= 1
    (changed / "expert.safetensors").write_bytes(content)
    assert str(changed) in fails(
        "merge", "--anchor", paths.anchor, changed, "--out", tmp_path / "out" / "model"
    )
    assert str(changed) in fails("verify", changed)


def test_a_manifest_that_was_cut_off_is_refused(paths, tmp_path, fails):
    cut = shutil.copytree(paths.contributions[0], tmp_path / "cut")
    (cut / "manifest.json").write_text((cut / "manifest.json").read_text()[:-9])
    assert "manifest.json is damaged" in fails(
        "merge", "--anchor", paths.anchor, cut, "--out", tmp_path / "out" / "model"
    )
    assert "manifest.json is damaged" in fails("info", cut)


@pytest.mark.parametrize(
    ("name", "setting", "says"),
    [
        ("St Mary", "train.steps=1", "the expert's name is 'St Mary'"),
        ("new", "data.seq_len=16", "public has records of 32 tokens, not 16"),
        ("new", "pair.public=nowhere", "nowhere does not exist"),
    ],
    ids=["name", "length of records", "public text"],
)
def test_mistakes_show_before_documents_are_prepared(name, setting, says, paths, tmp_path, fails):
    contribute = ["contribute", "--anchor", paths.anchor, "--documents", paths.code, "--name", name]
    assert says in fails(*contribute, "--set", setting, "--out", tmp_path / "out" / "it")


def test_work_of_other_documents_is_refused_with_the_option_that_mends_it(paths, tmp_path, fails):
    documents = ["--documents", paths.code, "--name", "new"]
    contribute = ["contribute", "--anchor", paths.anchor, *documents]
    for option, work in (("--work", tmp_path / "work"), ("--out", tmp_path / "out" / "it.work")):
        shutil.copytree(paths.data, work / "data")
        given = ["--work", work] if option == "--work" else []
        told = fails(*contribute, *given, "--out", tmp_path / "out" / "it")
        assert f"{work} was made from other documents" in told
        assert told.endswith(f"give a new {option}")


def test_experts_that_cannot_be_chosen_are_refused(paths, tmp_path, fails):
    out, code = tmp_path / "out" / "model", paths.contributions[0]
    assert "two experts are called 'code'" in fails(
        "merge", "--anchor", paths.anchor, code, code, "--out", out
    )
    assert "got no contribution; expected one or more" in fails(
        "merge", "--anchor", paths.anchor, "--out", out
    )
    assert "--active is 3; expected 1 to 2" in fails(
        "merge", "--anchor", paths.anchor, code, "--active", 3, "--out", out
    )
    assert "no expert 'nobody'" in fails("opt-out", paths.model, "--expert", "nobody", "--out", out)
    assert "the anchor cannot be excluded" in fails(
        "opt-out", paths.model, "--expert", "anchor", "--out", out
    )
    for use in (
        ["eval", paths.model, "--data", paths.data],
        ["generate", paths.model, "--prompt", "the cell"],
    ):
        assert "no expert 'nobody'" in fails(*use, "--without", "nobody")
        assert "the anchor cannot be excluded" in fails(*use, "--without", "anchor")
        assert "every expert of" in fails(
            *use, "--without", "code", "--without", "law", "--without", "care"
        )
        assert "--active is 9; expected 1 to 4" in fails(*use, "--active", 9)


def test_a_path_that_does_not_exist_is_said_not_to(paths, tmp_path, fails):
    """A typing mistake in a path is the commonest of all: what is wrong is not a file inside."""
    nowhere, out = tmp_path / "nowhere", tmp_path / "out" / "it"
    missing = f"{nowhere} does not exist"
    for command in (
        ["info", nowhere],
        ["verify", nowhere],
        ["gc", nowhere],
        ["verify", paths.contributions[0], "--trust", nowhere],
        ["merge", "--anchor", nowhere, "--out", out],
        ["merge", "--anchor", paths.anchor, nowhere, "--out", out],
        ["opt-out", nowhere, "--expert", "law", "--out", out],
    ):
        assert missing in fails(*command)


def test_an_artifact_of_another_kind_is_named(paths, tmp_path, fails):
    out = tmp_path / "out" / "it"
    assert "is a run; expected a published anchor" in fails(
        "merge", "--anchor", paths.run, "--out", out
    )
    contribute = ["contribute", "--documents", paths.code, "--name", "new", "--out", out]
    assert "is a run; expected a published anchor" in fails(*contribute, "--anchor", paths.run)
    assert "is a model; expected a published anchor" in fails(*contribute, "--anchor", paths.model)
    assert "is not a contribution" in fails(
        "merge", "--anchor", paths.anchor, paths.run, "--out", out
    )
    assert "has experts anchor, code, law, care" in fails(
        "publish", paths.model, "--public", paths.public, "--out", out
    )
    assert "is not a pair's run" in fails("package", paths.run, "--out", out)
    assert "is a anchor; expected a merged model" in fails(
        "opt-out", paths.anchor, "--expert", "code", "--out", out
    )
    assert "is not a run, anchor or model" in fails("info", paths.data.parent)
    assert "is a file" in fails("info", paths.config)
    for path in (paths.anchor, paths.model):
        evaluate = ["eval", path, "--data", paths.data, "--checkpoint", "best"]
        assert "is not a run and has no checkpoint 'best'" in fails(*evaluate)


def test_verify_refuses_to_be_asked_for_a_check_that_it_cannot_make(paths, tmp_path, fails):
    """Silence would pass for a check: an anchor, whoever wrote it, is not signed."""
    store = paths.model.parent / "flexolmo-store"
    trusted = tmp_path / "trusted"
    keygen(tmp_path / "owner")
    trusted.mkdir()
    (tmp_path / "owner.pub").rename(trusted / "owner.pub")
    no_anchors = (store, "a store"), (paths.data, "prepared data")
    for path, kind in ((paths.anchor, "an anchor"), *no_anchors):
        for asked in (["--signed"], ["--trust", trusted]):
            assert f"is {kind}, which nobody signs" in fails("verify", path, *asked)
    for path, kind in no_anchors:
        assert f"is {kind}, which has no anchor" in fails("verify", path, "--anchor", paths.anchor)
    for path in (paths.anchor, store, paths.data, paths.model):
        public = ["--anchor", paths.anchor, "--public", paths.data]
        assert "leave out --public" in fails("verify", path, *public)


@pytest.mark.parametrize(
    ("verb", "option"),
    [
        ("generate MODEL --prompt a", "--top-k 5"),
        ("generate MODEL --prompt a", "--top-p 0.9"),
        ("generate MODEL --prompt a", "--seed 3"),
        ("eval MODEL --tasks arc_easy", "--split all"),
        ("eval MODEL --tasks arc_easy", "--loss assistant"),
        ("eval MODEL --tasks arc_easy", "--text-key note"),
        ("eval MODEL --tasks arc_easy", "--skip-bad"),
        ("eval MODEL --data DATA", "--text-key note"),
        ("eval MODEL --data DATA", "--separator END"),
        ("package MODEL --expert code --anchor ANCHOR --out new", "--checkpoint best"),
        (
            "train RUN/config.yaml --out new --coordinator h:1 --processes 2 --process 0",
            "--distributed none",
        ),
    ],
)
def test_an_option_that_changes_nothing_is_refused_by_name(paths, fails, verb, option):
    places = {"MODEL": paths.model, "DATA": paths.data, "ANCHOR": paths.anchor, "RUN": paths.run}
    for name, path in places.items():
        verb = verb.replace(name, str(path))
    name, *value = option.split()
    told = fails(*verb.split(), name, *value)
    assert f"{name} " in told and "has no effect: " in told and "leave it out" in told


def test_a_mesh_that_has_nothing_to_hold_or_does_not_fit_is_refused(paths, tmp_path, fails):
    out, mesh = tmp_path / "out" / "it", ["--mesh", "fsdp=8"]
    code = paths.contributions[0]
    imported = ["--expert", "code", "--anchor", paths.anchor, "--out", out]
    assert "--mesh has no effect" in fails("package", paths.model, *imported, *mesh)
    assert "give --public too" in fails("verify", code, "--anchor", paths.anchor, *mesh)
    assert "give --public too" in fails("verify", paths.model, *mesh)
    assert "--mesh is for scoring --eval-data" in fails("export-hf", paths.run, out, *mesh)
    public = ["--anchor", paths.anchor, "--public", paths.data]
    screened = ["--anchor", paths.anchor, "--model", paths.anchor, "--out", f"{out}.json"]
    for command in (
        ["package", paths.pair, "--out", out],
        ["verify", code, *public],
        ["screen", code, *screened, "--documents", paths.code],
        ["export-hf", paths.model, out, "--drop-bias", "--eval-data", paths.data],
    ):
        assert "needs 64 devices; got 8" in fails(*command, "--mesh", "fsdp=64")
        assert "--mesh" in fails(*command, "--mesh", "width=8")


def test_an_output_that_holds_something_is_left_alone(paths, tmp_path, fails):
    out = tmp_path / "out" / "it"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    documents = ["--documents", paths.code]
    for command in (
        ["data", "prepare", "--input", paths.code, "--tokenizer", paths.anchor, "--seq-len", 32],
        ["tokenizer", "train", "--input", paths.public, "--vocab-size", 300],
        ["train", paths.config],
        ["publish", paths.run, "--public", paths.public],
        ["contribute", "--anchor", paths.anchor, *documents, "--name", "new"],
        ["package", paths.pair],
        ["merge", "--anchor", paths.anchor, *paths.contributions],
        ["opt-out", paths.model, "--expert", "code"],
        ["tune", paths.model, "--proxy", f"code={paths.public}", "--public", paths.public],
        ["embed-domain", "--anchor", paths.anchor, "--input", paths.code],
    ):
        assert f"{out} exists" in fails(*command, "--out", out)


def test_a_disk_that_fills_up_while_data_is_prepared_leaves_nothing(
    paths, tmp_path, fails, monkeypatch
):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("flexolmo_jax.data.prepare.os.fsync", full)
    prepare = [
        "data",
        "prepare",
        "--input",
        paths.code,
        "--tokenizer",
        paths.anchor,
        "--seq-len",
        32,
    ]
    assert "no space left" in fails(*prepare, "--out", tmp_path / "out" / "data")


@pytest.mark.parametrize(
    "error",  # as TensorStore and safetensors spell a full disk
    [
        ValueError(
            "RESOURCE_EXHAUSTED: Error writing local file: No space left on device"
            " [os_error_code='28']"
        ),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_during_a_merge_leaves_nothing(
    error, paths, tmp_path, fails, monkeypatch
):
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr("flexolmo_jax.storage.weights.Writer.write", full)
    merge = ["merge", "--anchor", paths.anchor, *paths.contributions]
    assert "no space left" in fails(*merge, "--out", tmp_path / "out" / "model")


def test_mistakes_in_choosing_proxies_and_tuning_are_told(paths, tmp_path, fails):
    proxy = ["proxy", "--anchor", paths.anchor, "--public", paths.public]
    assert "nowhere.jsonl does not exist" in fails(
        *proxy, "--private", "nowhere.jsonl", "--out", tmp_path / "out" / "p.jsonl"
    )
    assert "expected a share between 0 and 1" in fails(
        *proxy, "--private", paths.code, "--share", "2", "--out", tmp_path / "out" / "p.jsonl"
    )
    tune = ["tune", paths.model, "--public", paths.public, "--out", tmp_path / "out" / "it"]
    assert "expected NAME=FILE" in fails(*tune, "--proxy", paths.public)
    assert "two --proxy of 'code'" in fails(
        *tune, "--proxy", f"code={paths.public}", "--proxy", f"code={paths.code}"
    )
    assert "no expert 'theirs'" in fails(*tune, "--proxy", f"theirs={paths.public}")
    assert "nowhere.jsonl does not exist" in fails(*tune, "--proxy", "code=nowhere.jsonl")
    assert "did you mean 'optim.lr'?" in fails(
        *tune, "--proxy", f"code={paths.public}", "--set", "optim.rl=1"
    )
