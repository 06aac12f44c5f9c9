"""The cache: where the user says, else in the home folder, and where that cannot be written only as
long as the command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexolmo_jax.storage.cache import cache_folder


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLEXOLMO_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == cache_folder("downloads") == tmp_path / "cache"


def test_the_cache_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLEXOLMO_CACHE", raising=False)
    assert cache_folder("downloads") == tmp_path / ".cache/flexolmo-jax/downloads"
    monkeypatch.setenv("FLEXOLMO_CACHE", "gs://bucket/cache")
    assert cache_folder("downloads", on_disk=True) == tmp_path / ".cache/flexolmo-jax/downloads"


def test_a_command_without_a_home_folder_has_a_cache_that_goes_when_it_ends(tmp_path: Path):
    (tmp_path / "temporary").mkdir()
    (tmp_path / "file").write_text("")  # no home folder can be made below a file, by root neither
    program = """
import sys
from pathlib import Path
from flexolmo_jax.data.prepare import open_data
from flexolmo_jax.data.tokenizer import train_tokenizer
from flexolmo_jax.storage.cache import cache_folder
folder = Path(sys.argv[1])
(folder / "corpus.txt").write_text("A text. " * 200)
tokenizer = train_tokenizer([folder / "corpus.txt"], 300, folder / "tokenizer.json")
assert len(open_data(folder / "corpus.txt", tokenizer, 16, "train"))
assert cache_folder("downloads").parent == cache_folder() and (cache_folder() / "prepared").is_dir()
print(oct(cache_folder().stat().st_mode & 0o777))
"""
    said = {
        "HOME": str(tmp_path / "file" / "home"),
        "TMPDIR": str(tmp_path / "temporary"),
        "FLEXOLMO_CACHE": "",
    }
    environment = os.environ | said | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "0o700\n"), done.stderr
    assert (
        done.stderr.count("no cache in the home folder (Not a directory)") == 1
        and "set FLEXOLMO_CACHE" in done.stderr
    )
    assert list((tmp_path / "temporary").iterdir()) == []
