"""Files of strangers other than contributions: Hugging Face checkpoints, prepared data, embedders,
configs.

Whatever they hold, the outcome is a `UserError` in one line or a correct result, soon and in little
memory.
"""

import copy
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flexolmo_jax
from flexolmo_jax.config import load_config, resolve
from flexolmo_jax.convert.hub_config import BLOCKS, hf_config, model_config
from flexolmo_jax.convert.importing import import_hf
from flexolmo_jax.data.arrays import parse_header
from flexolmo_jax.data.records import Index
from flexolmo_jax.data.tokens import TokenRecords
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.embedder import load_embedder
from flexolmo_jax.plain_yaml import parse_yaml
from tests.attacks.foreign import FILES, MODEL, in_a_line, laughs, read_prepared

ODD = [
    None, True, False, -1, 0, 1, 1.5, -0.5, 1e300, 10**9, 2**63, 10**400, float("nan"), "", "x",
    "12", "x" * 10_000, "\0", "\ud800",
    "\x1b[2J", "\u202e", "../x", "/dev/zero",
    [], {}, [1], [[]], {"a": 1}, [None], {"": {"": {}}}, [{}] * 1000,
    {f"k{i}": i for i in range(1000)},
]  # fmt: skip
DEEP = 200  # levels


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside a value of JSON's types; of long ones, the first few."""
    yield at
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, other in list(inner)[:30]:
        yield from places(other, (*at, key))


@st.composite
def changed(draw, value: Any) -> str:
    """The text of a file with one thing changed: a value replaced, taken out, added or nested,
    anywhere in it."""
    value = copy.deepcopy(value)
    *way, last = draw(st.sampled_from(list(places(value))[1:]))
    inside = value
    for key in way:
        inside = inside[key]
    change = draw(st.sampled_from(["replace", "replace", "remove", "add", "nest", "cut"]))
    if change == "replace":
        inside[last] = draw(st.sampled_from(ODD))
    elif change == "remove":
        del inside[last]
    elif change == "add":
        inside = inside if isinstance(inside, dict) else value
        inside[draw(st.sampled_from(["surprise", "", "\ud800", "../x", "x" * 5000]))] = draw(
            st.sampled_from(ODD)
        )
    elif change == "nest":
        inside[last] = "DEEP"
    text = json.dumps(value).replace('"DEEP"', "[" * DEEP + "]" * DEEP)
    return text[: draw(st.integers(0, len(text) - 1))] if change == "cut" else text


@pytest.mark.parametrize("name", FILES)
@settings(
    max_examples=40,
    derandomize=True,
    database=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)
@given(data=st.data())
def test_a_file_with_anything_changed_is_refused_in_a_line_or_read_right(
    name, sources, tmp_path_factory, data
):
    """Promise: nothing a stranger sends crashes. An odd type once was a traceback."""
    kind, read = FILES[name]
    root = tmp_path_factory.mktemp("changed")
    source = sources[kind]
    target = Path(
        shutil.copytree(source, root / "x") if source.is_dir() else shutil.copy(source, root)
    )
    file = target / name if target.is_dir() else target
    file.write_text(
        data.draw(
            changed(
                parse_yaml(source.read_bytes())
                if name == "config.yaml"
                else json.loads(file.read_text())
            )
        )
    )
    try:
        read(target, root / "out")
    except UserError as error:
        in_a_line(error)
        assert not (root / "out").exists()
    finally:
        shutil.rmtree(root)


@pytest.mark.parametrize(
    ("compression", "members", "cut", "message"),
    [
        (zipfile.ZIP_DEFLATED, ["idf.npy", "signs.npy"], 0, "idf.npy is compressed"),
        (
            zipfile.ZIP_STORED,
            ["idf.npy", "signs.npy", "more.npy"],
            100,
            "no zip file of two arrays",
        ),
        (zipfile.ZIP_STORED, ["idf.npy", "other.npy"], 0, "signs.npy"),
        (zipfile.ZIP_STORED, ["idf.npy", "signs.npy"], 4, "idf.npy is no array of float32"),
    ],
)
def test_arrays_of_an_embedder_are_unpacked_only_as_they_were_written(
    compression, members, cut, message, sources, tmp_path
):
    """Promise: nothing a stranger sends fills the machine. 6 MB once unpacked to 6 GB."""
    copied = Path(shutil.copytree(sources["embedder"], tmp_path / "copy"))
    with zipfile.ZipFile(copied / "embedder.npz") as good:
        idf = good.read("idf.npy")
    with zipfile.ZipFile(copied / "embedder.npz", "w", compression) as bad:
        for name in members:
            bad.writestr(name, idf[: len(idf) - cut] if name == "idf.npy" else idf[:200])
    with pytest.raises(UserError, match=message) as error:
        load_embedder(copied)
    in_a_line(error.value)


def test_prepared_data_may_be_links_as_tools_for_data_make_them(sources, tmp_path):
    """Promise: what is refused of strangers is no burden for those who use it as it is meant."""
    for file in sources["prepared"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    read_prepared(tmp_path)


def test_a_config_may_be_a_link_as_mounted_ones_are(sources, tmp_path):
    """Promise: what is refused of strangers is no burden for those who use it as it is meant."""
    (tmp_path / "mounted.yaml").symlink_to(sources["run"])
    assert load_config(tmp_path / "mounted.yaml") == load_config(sources["run"])


def test_a_checkpoint_may_be_of_links_as_a_hub_cache_is(sources, tmp_path):
    """Promise: what is refused of strangers is no burden for those who use it as it is meant."""
    snapshot, blobs = tmp_path / "snapshots" / "0" / "x", tmp_path / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for number, file in enumerate(sources["hf"].iterdir()):
        (blobs / f"{number}").symlink_to(file)
        (blobs / f"also-{number}").symlink_to(f"{number}")
        (snapshot / file.name).symlink_to(f"../../../blobs/also-{number}")
    assert import_hf(snapshot, tmp_path / "model").experts == ("anchor", "expert1")


@pytest.mark.parametrize(
    "value",
    [
        laughs(9).replace("\n", ", ").join("{}"),
        "[" * 100 + "]" * 100,
        "!!python/name:os.system",
        "x: {y: 1, y: 2}",
        "1: 2:",
    ],
)
def test_an_override_is_yaml_within_the_same_bounds(value):
    """Promise: nothing a stranger has somebody paste fills the machine."""
    with pytest.raises(UserError, match="--set got") as error:
        resolve({"data": {"train": [{"path": "a"}]}}, [f"train.steps={value}"])
    in_a_line(error.value)


def test_values_of_yaml_are_those_of_yaml_1_2_and_strings_where_asked_for():
    """Promise: a config means what it meant, whoever reads it."""
    text = b"a: 1\nb: 1.5\nc: yes\nd: 2027-12-31\ne: null\nf: 1e-3\n"
    assert {key: str(value) for key, value in parse_yaml(text).items()} == {
        "a": "1", "b": "1.5", "c": "yes", "d": "2027-12-31", "e": "None", "f": "0.001",
    }  # fmt: skip
    assert parse_yaml(text, strings=True) == {
        "a": "1",
        "b": "1.5",
        "c": "yes",
        "d": "2027-12-31",
        "e": "null",
        "f": "1e-3",
    }


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "a: !!int x",
        "{[a]: b}",
        'a: "\\UFFFFFFFF"',
        "--- 1\n--- 2",
        "\0",
    ],
)
def test_yaml_that_is_none_is_a_value_error(text):
    """Promise: nothing a stranger sends crashes. Some of these were other exceptions of the
    library's."""
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse_yaml(text)


def test_more_experts_than_a_description_has_room_for_are_refused_before_any_are_counted():
    """Promise: nothing a stranger sends fills the machine. A table of 12 million tensors once took
    gigabytes."""
    fields = hf_config(MODEL) | {"num_hidden_layers": 1024}
    with pytest.raises(UserError, match=f"is {1024 * 33}; expected at most {BLOCKS}"):
        model_config(fields | {"num_experts": 33})
    assert model_config(fields | {"num_experts": 32}).n_experts == 32


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 4), "<u2"),
        np.zeros(5, ">u4"),
        np.zeros((), "f4"),
        np.zeros((2, 3), order="F"),
        np.zeros((0, 1), bool),
    ],
)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_headers_of_arrays_are_read_as_numpy_writes_them(array, version, tmp_path):
    """Promise: what is refused of strangers is no burden for those who use it as it is meant."""
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, array, version)
    content = (tmp_path / "a.npy").read_bytes()
    assert parse_header(content) == (
        array.shape,
        np.isfortran(array),
        array.dtype,
        len(content) - array.nbytes,
    )


def test_a_header_is_never_evaluated(tmp_path, tiny_tokenizer):
    """Promise: nothing a stranger sends runs."""
    text = b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }\n"
    (tmp_path / "x.npy").write_bytes(
        b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(24)
    )
    with pytest.raises(UserError, match="not a whole NumPy file"):
        TokenRecords(tmp_path / "x.npy", tiny_tokenizer, 2)


def test_an_embedder_of_another_width_than_its_anchors_is_refused(sources):
    """Promise: what an anchor carries fits it. It once was a traceback in training."""
    with pytest.raises(UserError, match="for d_model 16; the anchor has 32"):
        load_embedder(sources["embedder"], 32)


def test_an_index_names_no_file_but_those_that_are_prepared(sources, tmp_path):
    """Promise: a prepared directory is read, and nothing beside it."""
    copied = Path(shutil.copytree(sources["prepared"], tmp_path / "copy"))
    index = json.loads((copied / "index.json").read_text())
    for name in ("../x", "/etc/passwd", "train.tokens.npy/", "train.tokens.npy\n", "other.npy", ""):
        (copied / "index.json").write_text(json.dumps(index | {"files": {name: "0" * 64}}))
        with pytest.raises(UserError, match="not an index of prepared data"):
            Index.read(copied)


def test_an_override_of_any_depth_is_refused():
    """Promise: nothing a stranger has somebody paste crashes."""
    with pytest.raises(UserError, match="--set got") as error:
        resolve({"data": {"train": [{"path": "a"}]}}, [f"train.steps{'.a' * 50_000}=1"])
    in_a_line(error.value)


def test_yaml_is_read_in_one_place_and_numpy_unpacks_nothing():
    """Promise: a bound that holds for one file holds for all."""
    package = Path(flexolmo_jax.__file__).parent
    others = [path for path in package.rglob("*.py") if path.name != "plain_yaml.py"]
    found = [
        f"{path.name}: {call}"
        for path in others
        for call in re.findall(r"yaml\.\w*load\w*|np\.load\b|read_array", path.read_text())
    ]
    assert not found
