"""The command line: help for every verb, and what a verb prints."""

import json
import shlex
import subprocess
import sys
from typing import Any

import pytest

from flexolmo_jax.cli import main
from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime import environment

VERBS = [
    "data fetch", "data prepare", "tokenizer train", "train", "publish", "contribute", "package",
    "verify", "merge", "opt-out",
    "replace", "append", "verify-receipt", "gc", "keygen", "screen", "embed-domain", "proxy",
    "tune", "eval", "generate",
    "import-hf", "import-gguf", "export-hf", "push-to-hub", "anchor fetch",
    "plan", "info", "extract", "reproduce", "demo",
]  # fmt: skip


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_the_list_of_verbs_is_complete(capsys):
    top = {
        line.split()[0]
        for line in help_of("", capsys).splitlines()
        if line.startswith("    ") and not line.startswith("     ")
    }
    assert top == {verb.split()[0] for verb in VERBS}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_that_it_accepts(verb, capsys, monkeypatch, tmp_path):
    *_, example = help_of(verb, capsys).rstrip().split("example:\n  flexolmo ")
    assert example.startswith(verb) and "\n" not in example
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", print)  # nothing is downloaded
    if verb not in ("data fetch", "anchor fetch", "demo"):
        # its files do not exist here, but a word that is not understood would raise SystemExit
        main(shlex.split(example))


@pytest.mark.parametrize("command", ["--help", "train --help", "eval --help"])
def test_help_does_not_import_jax(command):
    program = (
        "import sys, flexolmo_jax.cli\ntry: flexolmo_jax.cli.main(sys.argv[1:])\nfinally:"
        " print(*{'jax', 'flax', 'numpy', 'orbax', 'tokenizers'} & set(sys.modules),"
        " file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *command.split()], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr.split()) == (0, [])
    assert result.stdout.startswith("usage: flexolmo")


def test_the_version_is_the_package_s(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"flexolmo-jax {environment.package_version()}\n"
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"1.2.3 of {name}")
    assert environment.package_version() == "1.2.3 of flexolmo-jax"


def test_a_mistake_ends_the_process_with_status_2_and_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "flexolmo_jax.cli",
        "train",
        str(tmp_path / "none.yaml"),
        "--out",
        str(tmp_path / "run"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr == f"flexolmo: no config at {tmp_path / 'none.yaml'}; expected a YAML file\n"
    )


def test_a_bug_is_not_told_as_a_mistake(paths, monkeypatch):
    def bug(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("flexolmo_jax.coordinator.info.info", bug)
    with pytest.raises(ZeroDivisionError):
        main(["info", str(paths.anchor)])


def test_debug_shows_where_a_mistake_was_found(tmp_path):
    with pytest.raises(UserError, match="is not a run, anchor or model"):
        main(["info", str(tmp_path), "--debug"])


def test_json_prints_one_object_on_stdout(paths, tmp_path, capfd):
    def output(*command: Any) -> dict[str, Any]:
        assert main([*(str(word) for word in command), "--json"]) == 0
        out, err = capfd.readouterr()
        assert out.count("\n") == 1 and "WARNING" not in err
        return json.loads(out)

    capfd.readouterr()
    out = tmp_path / "model"
    assert output("info", paths.contributions[0])["leaves_the_owner"]["documents"] == "none"
    assert output("verify", paths.contributions[1], "--anchor", paths.anchor)["verified"] is True
    assert output("merge", "--anchor", paths.anchor, paths.contributions[1], "--out", out)[
        "experts"
    ] == ["anchor", "law"]
    scores = output("eval", paths.model, "--data", paths.data, "--limit", 8, "--without", "code")
    assert scores["routing"]["public"]["code"] == 0 and scores["bits_per_byte"]["public"] > 0
    (pair,) = output("generate", paths.model, "--prompt", "the cell", "--max-new-tokens", 3)[
        "completions"
    ]
    assert pair["prompt"] == "the cell" and isinstance(pair["completion"], str)


def test_one_prompt_is_printed_as_it_is_completed(paths, capfd):
    capfd.readouterr()
    assert (
        main(["generate", str(paths.model), "--prompt", "the cell", "--max-new-tokens", "3"]) == 0
    )
    assert capfd.readouterr().out.startswith("the cell")
