"""Command lines that contradict themselves. The promise: what is checked is what runs."""

import pytest

from flexolmo_jax import cli


@pytest.fixture
def refused(capsys):
    """Runs a command that has to be refused; returns the line that says why."""

    def run(*words):
        assert cli.main([str(word) for word in words]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("flexolmo: ")
        return line

    return run


@pytest.mark.parametrize(
    "setting",
    ["run=joint", "pair=null", "pair.name=other", "pair.anchor=/elsewhere", "data.train=[]"],
)
def test_what_a_command_checked_is_not_set_to_something_else(
    refused, anchor, corpora, tmp_path, setting
):
    """What is verified is what runs: the anchor that was checked, and the name that was given."""
    command = ["contribute", "--anchor", anchor, "--documents", corpora["law"], "--name", "law"]
    line = refused(*command, "--out", tmp_path / "out", "--set", setting)
    assert "the command's own arguments" in line
    assert not list(tmp_path.iterdir())


def test_a_tuning_is_of_the_model_that_was_given(refused, model, corpora, tmp_path):
    """What is verified is what runs: who has left comes back by no other model."""
    data = ["--proxy", f"law={corpora['law']}", "--public", corpora["public"]]
    for setting in (f"router.model={model}", "run=joint"):
        line = refused("tune", model, *data, "--out", tmp_path / "out", "--set", setting)
        assert "the command's own arguments" in line
