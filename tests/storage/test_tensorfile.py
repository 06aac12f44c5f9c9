"""Safetensors read from strangers: what the library writes is read back; anything else is one
UserError, whatever its bytes are."""

import hashlib
import json
import os
import resource
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.contribution import MANIFEST, SIGNATURE, TENSORS, open_contribution
from flexolmo_jax.storage.tensorfile import BLOCK, FiniteCheck, TensorFile
from flexolmo_jax.storage.untrusted import parse_json

TENSOR = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: Any, data: bytes = bytes(24)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_what_the_library_writes_is_read_back(tmp_path, dtype):
    rng = np.random.default_rng(0)
    shapes = {"b": (3, 5), "a": (1500, 1700), "scalar": (), "none": (0, 4)}
    tensors = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "t")
    data = (tmp_path / "t").read_bytes()
    with TensorFile(tmp_path / "t") as file:
        assert file.entries.keys() == tensors.keys()
        assert (
            file.header_sha256
            == hashlib.sha256(data[: 8 + int.from_bytes(data[:8], "little")]).hexdigest()
        )
        for name, expected in tensors.items():
            for into in (None, np.empty(1 << 24, np.uint8)):
                got, digest, finite = file.read(name, into)
                assert (got.dtype, got.shape, got.tobytes()) == (
                    expected.dtype,
                    expected.shape,
                    expected.tobytes(),
                )
                assert digest == hashlib.sha256(expected.tobytes()).hexdigest() and finite
            assert file.check(name) == (digest, True)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
def test_the_finite_check_agrees_with_numpy(dtype, value):
    numbers = np.array(
        [0.0, -1.5, float(ml_dtypes.finfo(dtype).max), float(ml_dtypes.finfo(dtype).min)], dtype
    )
    for array in (numbers, np.append(numbers, np.array([value], dtype))):
        check = FiniteCheck(array.dtype)
        check.update(array.view(np.uint8))
        assert check.holds == np.isfinite(array.astype(np.float64)).all()


BAD = {
    "a gap": {"a": TENSOR, "b": TENSOR | {"data_offsets": [25, 49]}},
    "a gap in a file that is long enough for it": (
        {"a": TENSOR, "b": TENSOR | {"data_offsets": [25, 49]}},
        bytes(49),
    ),
    "an overlap": {"a": TENSOR, "b": TENSOR | {"data_offsets": [12, 36]}},
    "a hole at the start": {"a": TENSOR | {"data_offsets": [4, 28]}},
    "more than the file has": {"a": TENSOR | {"shape": [2, 300], "data_offsets": [0, 2400]}},
    "too few bytes for its shape": {"a": TENSOR | {"shape": [2, 4]}},
    "a negative size": {"a": TENSOR | {"shape": [-2, -3]}},
    "sizes whose product is beyond 64 bits": {"a": TENSOR | {"shape": [2**32, 2**32, 2**32]}},
    "a size that is true": {"a": TENSOR | {"shape": [True, 6]}},
    "an unknown dtype": {"a": TENSOR | {"dtype": "I64"}},
    "metadata": {"__metadata__": {"notes": "private"}, "a": TENSOR},
    "a key too many": {"a": TENSOR | {"more": 1}},
    "no offsets": {"a": {"dtype": "F32", "shape": [2, 3]}},
    "a list": [TENSOR],
    "a number": 3,
    "a key twice": (
        b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},'
        b'"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}'
    ),
    "depth": b"[" * 100_000,
    "no UTF-8": b"\xff\xfe{}",
    "data that nobody owns": {},
    "UTF-16": json.dumps({"a": TENSOR}).encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps({"a": TENSOR}).encode(),
    "a space before": b" " + json.dumps({"a": TENSOR}).encode(),
    "NULs behind": json.dumps({"a": TENSOR}).encode() + b"\0\0",
    "a shape that is an object": {
        "a": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]},
        "b": TENSOR | {"shape": [5], "data_offsets": [4, 24]},
    },
    "a shape that is a string": {
        "a": {"dtype": "F32", "shape": "", "data_offsets": [0, 4]},
        "b": TENSOR | {"shape": [5], "data_offsets": [4, 24]},
    },
    "sizes beyond 64 bits times 0": {
        "a": TENSOR,
        "b": {"dtype": "F32", "shape": [2**40, 2**40, 0], "data_offsets": [24, 24]},
    },
    "minus 0": b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[-0,24]}}',
}


@pytest.mark.parametrize("header", BAD.values(), ids=BAD.keys())
def test_a_header_that_is_wrong_is_an_error_of_one_line(tmp_path, header):
    header, data = header if isinstance(header, tuple) else (header, bytes(24))
    with pytest.raises(UserError, match="cannot be read as safetensors") as error:
        TensorFile(write(tmp_path / "t", header, data))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\xff" * 8,
        (2**63).to_bytes(8, "little") + b"{}",
        (3).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_length_beyond_the_file_allocates_nothing(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        TensorFile(tmp_path / "t")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_links_pipes_and_folders_are_not_followed(tmp_path):
    write(tmp_path / "secret", {"a": TENSOR})
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder", "nothing"):
        with pytest.raises(UserError, match="regular file"):
            TensorFile(tmp_path / name)


@pytest.mark.parametrize("name", [MANIFEST, TENSORS, SIGNATURE])
def test_a_contribution_with_a_link_or_a_folder_in_it_is_refused(contributions, tmp_path, name):
    import shutil

    for make in (lambda path: path.symlink_to("/etc/passwd"), lambda path: path.mkdir(), os.mkfifo):
        copy = Path(shutil.copytree(contributions["code"], tmp_path / "copy"))
        (copy / name).unlink(missing_ok=True)
        make(copy / name)
        with pytest.raises(UserError, match="is not a regular file"):
            open_contribution(copy)
        shutil.rmtree(copy)


def test_a_header_of_more_bytes_or_tensors_than_it_needs_is_refused_before_it_is_parsed(tmp_path):
    with pytest.raises(UserError, match="its header has 65 bytes; expected at most 60"):
        TensorFile(write(tmp_path / "t", {"a": TENSOR}), header_limit=60)
    empty = {f"a{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(90_000)}
    with pytest.raises(UserError, match="630000 commas and brackets; expected at most 524288"):
        TensorFile(write(tmp_path / "t", empty, b""))
    TensorFile(write(tmp_path / "t", dict(list(empty.items())[:65_000]), b"")).close()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I64"]) | json_values,
        "shape": st.lists(st.integers(-2, 2**70), max_size=10) | json_values,
        "data_offsets": st.lists(st.integers(-2, 2**70), max_size=3) | json_values,
    },
)
fuzz = settings(max_examples=300, derandomize=True)


@fuzz
@given(
    header=st.dictionaries(st.text(max_size=5), entries, max_size=3)
    | json_values
    | st.binary(max_size=60),
    data=st.binary(max_size=40),
)
@example(header={}, data=b"")
def test_any_header_is_read_or_refused(tmp_path_factory, header, data):
    path = write(tmp_path_factory.getbasetemp() / "fuzzed", header, data)
    try:
        with TensorFile(path) as file:
            assert sum(file.read(name)[0].nbytes for name in file.entries) == len(data)
    except UserError as error:
        assert "\n" not in str(error)


# Near misses of a header: what a library reads that we do not would be a second meaning of the same
# bytes.
sizes = st.sampled_from(
    [
        "0",
        "1",
        "2",
        "3",
        "6",
        "24",
        "-0",
        "-1",
        "01",
        "1.0",
        "1e0",
        "18446744073709551616",
        '"1"',
        "true",
        "null",
        "[1]",
    ]
)
pieces = st.fixed_dictionaries(
    {
        "before": st.sampled_from(["", "", "", " ", "\n", "\ufeff"]),
        "after": st.sampled_from(["", "", "", " ", "   ", "\n", "\0", "{}", ","]),
        "name": st.sampled_from(["a", "a", "\\u0061", "\\ud800", "\x01", "é", "__metadata__"]),
        "dtype": st.sampled_from(["F32", "F32", "F16", "BF16", "f32", "I64", "F8_E4M3"]),
        "shape": (
            st.lists(sizes, max_size=4).map(lambda texts: f"[{','.join(texts)}]")
            | st.sampled_from(["{}", '""', "[6]", "[2,3]", "6"])
        ),
        "begin": st.just("0") | sizes,
        "end": st.just("24") | sizes,
        "more": st.sampled_from(["", "", ',"more":1', ',"shape":[6]', ","]),
        "second": st.sampled_from(
            [
                "",
                "",
                ',"b":{"dtype":"F32","shape":[0],"data_offsets":[24,24]}',
                ',"__metadata__":{"a":1}',
                ',"__metadata__":null',
            ]
        ),
    }
)


@settings(fuzz, max_examples=1000)
@given(piece=pieces)
def test_what_the_library_refuses_is_refused(tmp_path_factory, piece):
    text = (
        (
            '{before}{{"{name}":{{"dtype":"{dtype}","shape":{shape},'
            '"data_offsets":[{begin},{end}]{more}}}{second}}}{after}'
        ).format(**piece)
    ).encode("utf-8", "surrogatepass")
    path = write(tmp_path_factory.getbasetemp() / "near", text)
    try:
        TensorFile(path, with_metadata=True).close()
    except UserError:
        return
    try:
        with safe_open(path, "np") as opened:
            opened.keys()
    except SafetensorError as error:
        pytest.fail(f"the library refuses what we read: {error}: {text!r}")


@fuzz
@given(data=st.data())
def test_any_manifest_is_read_or_refused(contributions, tmp_path_factory, data):
    """A real one with any part replaced by anything, its own digest made right."""
    from flexolmo_jax.exchange.contribution import sealed

    directory = tmp_path_factory.getbasetemp() / "fuzzed-contribution"
    directory.mkdir(exist_ok=True)
    if not (directory / TENSORS).exists():
        os.link(contributions["code"] / TENSORS, directory / TENSORS)
    manifest = json.loads((contributions["code"] / MANIFEST).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        node: Any = manifest
        while True:
            key = data.draw(
                st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node)))
            )
            if isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
                node = node[key]
                continue
            node[key] = data.draw(json_values)
            break
    try:
        text = sealed(manifest)
    except ValueError:
        return  # numbers that are not JSON
    (directory / MANIFEST).write_bytes(text)
    try:
        for _ in open_contribution(directory).tensors():
            pass
    except UserError as error:
        assert "\n" not in str(error)


@fuzz
@given(text=st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_parse_json_is_json_or_an_error(text):
    try:
        value = parse_json(text)
    except (ValueError, RecursionError):
        return
    assert json.loads(text) == value or value != value


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_one_number_that_is_not_finite_is_found_in_whichever_block_it_lies(tmp_path, dtype, block):
    """Tensors are read in blocks; what is found in one is not forgotten in the next."""
    values = np.zeros(5 * BLOCK // 2 // np.dtype(dtype).itemsize, dtype)
    place = block * BLOCK // values.itemsize + 7
    values[place] = np.nan
    save_file({"a": values, "b": np.zeros(3, dtype)}, tmp_path / "t")
    with TensorFile(tmp_path / "t") as file:
        assert (
            not file.read("a")[2]
            and not file.check("a")[1]
            and file.read("b")[2]
            and file.check("b")[1]
        )
        assert (
            not file.read_part("a", 0, values.shape)[1] and not file.read_part("a", place, (1,))[1]
        )
        assert file.read_part("a", place + 1, (values.size - place - 1,))[1]
