"""Links that lead nowhere. The promise: they are told in one line."""

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


@pytest.mark.parametrize("place", ["circle", "circle/below"])
def test_links_in_a_circle_are_told_in_a_line(refused, anchor, contributions, tmp_path, place):
    """Told in one line: a link that leads to itself, wherever a place is asked for."""
    (tmp_path / "circle").symlink_to("circle")
    place = tmp_path / place
    assert "leads back" in refused(
        "merge", "--anchor", anchor, contributions["law"], "--out", place
    )
    assert "leads back" in refused("gc", place)
    assert "leads back" in refused("import-hf", place, tmp_path / "out")
