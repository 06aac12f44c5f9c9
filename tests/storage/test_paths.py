"""Where a path of a user's becomes a path, whatever its spelling and its characters."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexolmo_jax.errors import RunError, UserError
from flexolmo_jax.plain_yaml import read_yaml
from flexolmo_jax.storage.checkpoint import StepCheckpoints
from flexolmo_jax.storage.files import append_bytes, discard
from flexolmo_jax.storage.paths import (
    check_for_checkpoints,
    children,
    listing,
    path_of,
    takes_paths,
)

STATE = {"params": {"a": np.arange(3.0)}}


class Given(os.PathLike):
    """Any object that Python takes for a path."""

    def __init__(self, text: str):
        self._text = text

    def __fspath__(self) -> str:
        return self._text


@pytest.mark.parametrize("kind", [str, Path, Given])
def test_a_path_is_found_from_the_home_folder_and_through_what_lies_above(
    kind, tmp_path, monkeypatch
):
    (tmp_path / "there" / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to("there/inside")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "there")
    for written, meant in {
        "~": tmp_path,
        "~/a/b": tmp_path / "a" / "b",
        "..": tmp_path,
        "../x": tmp_path / "x",
        "inside/../../x": tmp_path / "x",
        "../link/../x": tmp_path / "there" / "x",  # as the system reads it
        "../missing/../x": tmp_path / "x",
        ".": tmp_path / "there",
        "plain/x/": Path("plain/x"),
        "a:b/~x": Path("a:b/~x"),
    }.items():
        found = path_of(kind(written))
        assert found == meant and path_of(found) == found, written


@pytest.mark.parametrize("name", ["./~x", "./~", "./a:/b"])
def test_a_name_that_means_something_else_at_the_beginning_stays_a_name(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    found = path_of(name)
    assert found == path_of(found) == tmp_path / name
    assert path_of("~nobody-is-called-so/x") == tmp_path / "~nobody-is-called-so" / "x"


@pytest.mark.parametrize("text", ["a\0b", "s3://bucket/x", "file:/x"])
def test_what_is_no_path_is_refused(text):
    with pytest.raises(UserError, match="expected one on this machine"):
        path_of(text)


def test_a_home_folder_that_is_not_there_is_no_folder_called_so(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without a home
    with pytest.raises(UserError, match="set HOME"):
        path_of("~/x")


def test_functions_take_paths_alone_in_lists_and_by_name(tmp_path, monkeypatch):
    @takes_paths
    def function(
        one: Path,
        text: str,
        several: Sequence[Path] = (),
        *,
        named: Mapping[str, Path] | None = None,
        more: Mapping[str, Path] = {},
        maybe: Path | None = None,
    ) -> tuple:
        return one, text, several, named, more, maybe

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    a, b = tmp_path / "a", tmp_path.parent / "b"
    given: Any = [Given("~/a"), "~/b", ["~/a", Path("../b")]]
    found = function(*given, more={"x": "../b"})  # type: ignore[dict-item]
    assert found == (a, "~/b", [a, b], None, {"x": b}, None)
    assert function(*given, maybe=Path("~/a"))[-1] == a
    for alone in ("~/a", Path("~/a"), Given("~/a")):  # in the place of several
        assert function("~/a", "", alone)[2] == [a]  # type: ignore[arg-type]
    (tmp_path / "run.yaml").write_text("a: 1")
    for given in ("~/run.yaml", Path("~/run.yaml"), Given("run.yaml")):
        assert read_yaml(given) == {"a": 1}


def test_an_empty_path_is_not_the_working_directory():
    with pytest.raises(UserError, match="got an empty path; expected"):
        path_of("")


def test_a_run_is_read_back_from_a_path_with_brackets(tmp_path):
    place = tmp_path / "lr[0.1]" / "a*b?" / "checkpoints"
    with StepCheckpoints(place, keep=1) as checkpoints:
        checkpoints.save(1, STATE)
        checkpoints.read_back(1, STATE)
    with StepCheckpoints(place, keep=1) as checkpoints:
        found = checkpoints.restore_latest(STATE)
    assert found is not None and found[0] == 1
    assert np.array_equal(found[1]["params"]["a"], STATE["params"]["a"])


def test_what_was_saved_and_cannot_be_read_ends_the_run(tmp_path):
    def saved(*, without: str) -> StepCheckpoints:
        checkpoints = StepCheckpoints(tmp_path / without / "checkpoints", keep=1)
        checkpoints.save(1, STATE)
        checkpoints.wait()
        for path in (tmp_path / without / "checkpoints" / "1" / "default").rglob(without):
            path.write_bytes(b"")
        return checkpoints

    for name in ("manifest.ocdbt", "_METADATA"):
        with saved(without=name) as checkpoints, pytest.raises(RunError, match="saved just now"):
            checkpoints.read_back(1, STATE)
    with StepCheckpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(1, STATE)
        with pytest.raises(RunError, match="lacks arrays"):
            checkpoints.read_back(1, STATE | {"more": np.zeros(2)})


def test_a_checkpoint_that_is_intact_stays_where_it_is_though_it_cannot_be_restored(tmp_path):
    with StepCheckpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, STATE)
        checkpoints.wait()
        with pytest.raises(UserError, match="is intact, but cannot be restored"):
            checkpoints.restore_latest(STATE | {"more": np.zeros(2)})
        assert checkpoints.steps() == [1]


@pytest.mark.parametrize("name", ["lr[0.1]", "a*b", "100%s é", "~x", "-d"])
def test_no_name_in_a_bucket_is_a_pattern(bucket, name):
    near = [path_of(f"{bucket}/{other}/keep") for other in ("lr0", "lr.", "ab", "aXb")]
    for path in near:
        path.write_bytes(b"others'")
    place = path_of(f"{bucket}/{name}")
    with StepCheckpoints(place / "checkpoints", keep=1) as checkpoints:
        for step in (1, 2):  # the first is removed
            checkpoints.save(step, STATE)
            checkpoints.read_back(step, STATE)
    with StepCheckpoints(place / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2]
    for content in (b"1", b"2"):
        append_bytes(place / "log", content)
    assert (place / "log").read_bytes() == b"12"
    discard(place / "checkpoints")
    assert list(listing(place)) == ["log"] and all(path.exists() for path in near)
    assert {path.name for path in children(bucket)} == {name, "lr0", "lr.", "ab", "aXb"}


@pytest.mark.parametrize("name", ["what?", "a#1", "two\nlines"])
def test_a_path_in_a_bucket_that_orbax_cannot_read_is_refused(bucket, name):
    with pytest.raises(UserError, match="checkpoints cannot lie in"):
        check_for_checkpoints(path_of(f"{bucket}/{name}/run"))
