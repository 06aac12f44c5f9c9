"""Attacks by what surrounds a command: its folder, its environment, the names of paths. The
promise: what runs is what is installed and verified, and a mistake is told in a line."""

import os
import subprocess
import sys

import pytest

from flexolmo_jax.cli import main
from flexolmo_jax.reproduce import running, study
from flexolmo_jax.storage import cache
from flexolmo_jax.storage.paths import children


def told_in_a_line(capfd) -> str:
    said = capfd.readouterr().err.strip()
    assert "Traceback" not in said
    return said.splitlines()[-1]


@pytest.mark.parametrize("name", ["caf\udce9", "a\\b"])
@pytest.mark.parametrize("place", ["--out", "--store"])
def test_a_path_that_arrays_cannot_have_is_refused(
    anchor, contributions, tmp_path, capfd, name, place
):
    """No traceback, and nothing is written elsewhere: TensorStore takes UTF-8 only, and a backslash
    for a slash, so that `a\\b` was written into the folder `a` of somebody."""
    places = {"--out": tmp_path / "model", "--store": tmp_path / "store"}
    places[place] = tmp_path / name
    options = [str(part) for pair in places.items() for part in pair]
    assert main(["merge", "--anchor", str(anchor), str(contributions["law"]), *options]) == 2
    assert "without a backslash" in told_in_a_line(capfd)
    assert not places["--out"].exists() and not (tmp_path / "a").exists()


def test_an_anchor_with_such_a_name_is_refused(anchor_run, corpora, tmp_path, capfd):
    """No traceback, and nothing is left."""
    out = tmp_path / "caf\udce9"
    assert main(["publish", str(anchor_run), "--public", str(corpora["public"]), "--out", str(out)])
    assert "without a backslash" in told_in_a_line(capfd)
    assert not children(tmp_path)


def test_a_study_runs_no_modules_of_the_working_directory(tmp_path, monkeypatch):
    """What runs is what is installed: a study's processes imported `json.py` and `flexolmo_jax`
    from where it was started, which may be an unpacked archive of a stranger's."""
    here = tmp_path / "here"
    (here / "flexolmo_jax").mkdir(parents=True)
    for path in (here / "json.py", here / "flexolmo_jax" / "__init__.py"):
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    (tmp_path / "study" / "logs").mkdir(parents=True)
    monkeypatch.chdir(here)
    root = tmp_path / "study"
    environment, _ = running._sharing(root, 1)
    running._close(running._start(study.__name__, "cell", root, environment))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name, value",
    [
        ("JAX_PLATFORMS", "cuda,none"),
        ("JAX_DEFAULT_MATMUL_PRECISION", "odd"),
        ("JAX_NUM_CPU_DEVICES", "some"),
        ("JAX_ENABLE_X64", "1"),
        ("JAX_ENABLE_X64", "maybe"),
        ("JAX_TRANSFER_GUARD", "disallow"),
        ("JAX_RANDOM_SEED_OFFSET", "1"),
        ("JAX_NO_EXECUTION", "1"),
        ("JAX_DISABLE_JIT", "1"),
    ],
)
def test_mistakes_in_jaxs_variables_are_told_in_a_line(model, tmp_path, name, value):
    """No traceback: it named JAX's own lines, and no variable."""
    command = [sys.executable, "-m", "flexolmo_jax.cli", "generate", str(model), "--prompt", "a"]
    command += ["--max-new-tokens", "4"]
    environment = {**os.environ, name: value}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert name in done.stderr.strip().splitlines()[-1]


def test_nothing_is_cached_below_the_working_directory(tmp_path, monkeypatch, capfd):
    """No directory speaks for itself: with a relative home, documents that somebody had prepared in
    the working directory were trained on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "here")
    monkeypatch.delenv(cache.CACHE_VARIABLE, raising=False)
    cache._temporary.cache_clear()
    assert cache.cache_folder("downloads").is_absolute()
    assert not (tmp_path / "here").exists()
