"""Checks an anchor's or a model's files against its description: names, digests, fingerprint.

An anchor's fingerprint is the digest of its parts: its architecture, every tensor's dtype, shape
and SHA-256, the tokenizer, the chat template, its publisher's conventions, the embedder and the
public training records (not the held-out ones). A merged model keeps its anchor's parts, so its
trunk and its expert 0 are checked against the same fingerprint.

The bytes that are checked must be the bytes that are used. Zarr's and Orbax's own files decide how
weights are read, so they must equal what weights.py writes for the described tensors, and the
directory may hold no other files.
"""

import dataclasses
import hashlib
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.chat import CHAT_FILE
from flexolmo_jax.data.conventions import CONVENTIONS_FILE
from flexolmo_jax.data.records import Index, open_records
from flexolmo_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer
from flexolmo_jax.description import DESCRIPTION, canonical_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import logical_axes, parameter_shapes
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.runtime.progress import bar
from flexolmo_jax.storage.paths import children, in_bucket, listing, open_regular, size_of
from flexolmo_jax.storage.untrusted import read_bytes
from flexolmo_jax.storage.weights import Box, Layout, Reader, metadata_files, shard_name

RECEIPT, RECEIPT_SIGNATURE = "receipt.json", "receipt.sig"
_OPTIONAL = {"model": {RECEIPT, RECEIPT_SIGNATURE}}  # files by the kind of artifact
MATRICES = ("gate", "up", "down")
# keys of a model's config that a merge decides
OF_MERGES = ("n_experts", "n_active", "router_bias")
EMBEDDER_LIMIT = 1 << 30  # bytes of an embedder's file
# keys of a description
TOKENIZER_PARTS = {
    "tokenizer": "tokenizer",
    "chat": "chat template",
    "conventions": "conventions file",
}
ZEROS = "zeros"  # in place of a digest: the bias of an expert that has none is stored as zeros


def check(path: Path, description: Mapping[str, Any], config: ModelConfig) -> None:
    """Reads every byte of an anchor or a model.

    Raises UserError that names the first difference from its description.
    """
    check_files(path, description, config)
    if "tokenizer" in description:
        check_tokenizer(path, Tokenizer.load(path), description)
    if description["kind"] == "anchor":
        _check_anchor(path, description)
    elif description["fingerprint"] is not None and not is_of_its_anchor(description):
        raise UserError(
            f"{path} names a fingerprint ({description['fingerprint'][:16]}) that is not its"
            " anchor's; do not use it"
        )
    check_config(path, description)
    for what, digest, expected in tensor_digests(path, description, config):
        if digest != expected:
            raise UserError(
                f"{path}: the bytes of {what} are not those of its description; fetch it again, or"
                " make a new one"
            )


def check_tokenizer(path: Path, tokenizer: Tokenizer, description: Mapping[str, Any]) -> None:
    """Raises UserError unless tokenizer, chat template and conventions are those of a
    description."""
    for key, what in TOKENIZER_PARTS.items():
        if tokenizer.digests.get(key) != description.get(key):
            raise UserError(f"{path}: its {what} is not the one of its description; fetch it again")


def check_config(path: Path, description: Mapping[str, Any]) -> None:
    """Raises UserError if a merged model's architecture, tokenizer or chat template is not the one
    that its anchor has."""
    is_merged = description["kind"] == "model" and description["fingerprint"] is not None
    if not is_merged or description["format"] == 1:  # format 1 kept none of them
        return
    anchor = description["anchor"]
    check_model(path, description["model"], anchor["model"])
    for key, what in TOKENIZER_PARTS.items():
        if description.get(key) != anchor.get(key):
            raise UserError(f"{path} has another {what} than its anchor; do not use it")


def check_model(path: Path, ours: Mapping[str, Any], anchors: Mapping[str, Any]) -> None:
    """Raises UserError unless an architecture is the anchor's, except for what a merge decides."""
    for key in sorted((ours.keys() | anchors.keys()) - set(OF_MERGES)):
        if ours.get(key) != anchors.get(key):
            raise UserError(
                f"{path} has model.{key} {ours.get(key)!r:.40}; its anchor has"
                f" {anchors.get(key)!r:.40}; do not use it"
            )


def check_run(path: Path, description: Mapping[str, Any], config: ModelConfig) -> None:
    """Raises UserError unless a run trained what its kind and its model's architecture say: of a
    pair an expert, of a router run rows and biases, of any other everything."""
    kind = description["run"]
    if (kind in ("pair", "router")) != ("base" in description):
        raise UserError(
            f"{path} is a run ({kind}) {'with' if 'base' in description else 'without'} a base;"
            " only a pair and a router run stand on one; train it anew"
        )
    expected = _trained_shapes(kind, config)
    found = {name: tuple(entry["shape"]) for name, entry in description["tensors"].items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{path}: {name!r:.60} has the shape {found.get(name)}; a run ({kind}) of this"
                f" model makes it {expected.get(name)}; do not use it"
            )


def _trained_shapes(kind: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    if kind == "pair":  # an anchor has no bias, its new expert may have one
        config = dataclasses.replace(config, n_experts=2)
    shapes = {name: tuple(shape) for name, shape in parameter_shapes(config).items()}
    if kind == "pair":
        return {
            name.replace("experts/", "expert/"): (shape[0], 1, *shape[2:])
            for name, shape in shapes.items()
            if name.startswith("experts/")
        }
    if kind == "router":
        return {name: shapes[name] for name in ("experts/row", "experts/bias") if name in shapes}
    return shapes


def check_files(path: Path, description: Mapping[str, Any], config: ModelConfig) -> None:
    """Checks names, kinds and sizes of all files, and Zarr's and Orbax's byte for byte.

    Reads no weights. Raises UserError.
    """
    expected, found = _sizes(path, description, config), listing(path)
    for name, content in metadata_files(layouts(config, description["tensors"])).items():
        file = path / "weights" / name
        if f"weights/{name}" in found and _content(file, len(content)) != content:
            raise UserError(
                f"{file} does not belong to these tensors (another layout, or changed); make a new"
                f" {path}"
            )
    if missing := expected.keys() - found.keys():
        raise UserError(
            f"{path} is not whole: {min(missing)} is missing ({len(missing)} files are missing);"
            " fetch it again"
        )
    expected |= dict.fromkeys(found.keys() & _OPTIONAL.get(description["kind"], set()))
    if unknown := found.keys() - expected.keys():
        raise UserError(
            f"{path} holds unknown files: {', '.join(map(repr, sorted(unknown)[:3]))}; remove them,"
            " or fetch it again"
        )
    for name, size in expected.items():
        if not in_bucket(path) and not stat.S_ISREG((path / name).lstat().st_mode):
            raise UserError(f"{path / name} is not a regular file; fetch {path} again")
        if size is not None and found[name].size != size:
            raise UserError(
                f"{path / name} has {found[name].size} bytes; expected {size}; fetch {path} again"
            )


def _content(file: Path, size: int) -> bytes | None:
    """The bytes of a regular file; None if it is none, or has more than `size` bytes."""
    try:
        return read_bytes(file, size)
    except (OSError, UserError):
        return None


def _sizes(
    path: Path, description: Mapping[str, Any], config: ModelConfig
) -> dict[str, int | None]:
    """The size of every file by its name; None if the description does not imply it."""
    tensors, shapes = description["tensors"], parameter_shapes(config)
    for name in tensors.keys() | shapes.keys():
        got = tuple(tensors[name]["shape"]) if name in tensors else None
        if got != shapes.get(name):
            raise UserError(
                f"{path}: {name!r:.60} has the shape {got}; expected {shapes.get(name)}, as the"
                " model's config says; do not use it"
            )
    target = layouts(config, tensors)
    sizes: dict[str, int | None] = {DESCRIPTION: None}
    described = {"tokenizer": TOKENIZER_FILE, "chat": CHAT_FILE, "conventions": CONVENTIONS_FILE}
    sizes |= {file: None for key, file in described.items() if key in description}
    sizes |= {f"weights/{name}": len(content) for name, content in metadata_files(target).items()}
    for array, layout in target.items():
        names = (f"weights/{shard_name(array, index)}" for index in layout.indices())
        sizes |= dict.fromkeys(names, layout.shard_bytes)
    if description["kind"] == "anchor":
        sizes["embedder/embedder.json"] = None
        if (path / "embedder" / "embedder.npz").exists():
            sizes["embedder/embedder.npz"] = None  # covered by the embedder's digest
        sizes["public/index.json"] = None
        public = Index.read(path / "public").files
        sizes |= dict.fromkeys((f"public/{name}" for name in public), None)
    return sizes


def _check_anchor(path: Path, description: Mapping[str, Any]) -> None:
    parts = parts_of(description) | {"embedder": embedder_digest(path / "embedder")}
    if "public" in parts:
        parts["public"] = public_digest(path / "public")
    if fingerprint_of(parts) != description["fingerprint"]:
        raise UserError(
            f"{path} does not have its fingerprint: tokenizer, chat template, embedder, public text"
            " or description was changed; fetch it again"
        )
    open_records(path / "public", "train").check_digests()


def parts_of(description: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of an anchor, or of a model's anchor: what a fingerprint is the digest of."""
    if description["kind"] != "anchor":
        return dict(description["anchor"])
    parts = {key: description[key] for key in ("model", "tensors", "tokenizer")}
    parts["embedder"] = description["embedder"]["sha256"]
    optional = {"public": "public_sha256", "chat": "chat", "conventions": "conventions"}
    parts |= {part: description[key] for part, key in optional.items() if key in description}
    return parts


def is_of_its_anchor(description: Mapping[str, Any]) -> bool:
    """Whether a model's fingerprint is the digest of its anchor's parts.

    True for format 1, which kept no parts to compute it from.
    """
    if description["format"] == 1:
        return True
    return fingerprint_of(parts_of(description)) == description["fingerprint"]


def anchor_tensors(description: Mapping[str, Any]) -> dict[str, Any]:
    """Dtype, shape and SHA-256 of every tensor of a merged or imported model's anchor."""
    return description["anchor"] if description["format"] == 1 else description["anchor"]["tensors"]


def tensors_of(member: Mapping[str, Any]) -> dict[str, Any]:
    """Dtype, shape and SHA-256 of every tensor that a member of a model contributed."""
    return manifest["tensors"] if (manifest := manifest_of(member)) else member["tensors"]


def manifest_of(member: Mapping[str, Any]) -> dict[str, Any] | None:
    """A member's whole manifest; None in imported models and in those of format 1."""
    return member["manifest"] if isinstance(member.get("manifest"), dict) else None


def tensor_digests(
    path: Path, description: Mapping[str, Any], config: ModelConfig
) -> Iterator[tuple[str, str, str]]:
    """Yields (name for messages, SHA-256 of the stored values, SHA-256 expected) of every tensor.

    Shows a progress bar. One shard at a time is in memory.
    """
    reader, tensors = Reader(path / "weights"), description["tensors"]
    total = sum(int(np.prod(t["shape"])) * np.dtype(t["dtype"]).itemsize for t in tensors.values())
    with bar(f"verify {path.name}", float(total), in_bytes=True) as advance:
        for what, array, expected, boxes in _expected_digests(description, config):
            if expected == ZEROS:
                stored = (reader.read(array, box).view(np.uint8) for box in boxes)
                is_zero = not any(np.count_nonzero(values) for values in stored)
                yield what, ZEROS if is_zero else "other numbers", expected
            else:
                yield what, reader.digest(array, boxes), expected
            values = sum(int(np.prod([part.stop - part.start for part in box])) for box in boxes)
            advance(values * np.dtype(tensors[array]["dtype"]).itemsize)


def _expected_digests(
    description: Mapping[str, Any], config: ModelConfig
) -> Iterator[tuple[str, str, str, list[Box]]]:
    """Yields (name for messages, array, SHA-256 expected, the parts of the array it covers).

    The trunk and expert 0 must have the anchor's digests, and every other expert those of its
    contribution. Tuned router rows have digests of their own.
    """
    tensors, tuned = description["tensors"], description.get("router", {}).get("tensors", {})
    for array, layout in layouts(config, tensors).items():
        if "anchor" not in description or description["kind"] == "anchor":
            yield array, array, tensors[array]["sha256"], list(layout.boxes())
        elif array in tuned:
            yield array, array, tuned[array], layout.whole()
        elif not array.startswith("experts/"):
            digest = anchor_tensors(description)[array]["sha256"]
            yield array, array, digest, list(layout.boxes())
        else:
            yield from _expected_of_experts(description, array, layout)


def _expected_of_experts(
    description: Mapping[str, Any], array: str, layout: Layout
) -> Iterator[tuple[str, str, str, list[Box]]]:
    anchor = anchor_tensors(description)
    expected = anchor[array]["sha256"] if array in anchor else ZEROS
    yield f"{array} of anchor", array, expected, list(layout.boxes(expert=0))
    for index, member in enumerate(description["members"], 1):
        tensors, expert = tensors_of(member), member["name"]
        if name_of_tensor(array, 0) not in tensors:  # an expert without a bias
            yield f"{array} of {expert}", array, ZEROS, list(layout.boxes(expert=index))
            continue
        for layer in range(layout.shape[0]):
            name = name_of_tensor(array, layer)
            boxes = list(layout.boxes(layer=layer, expert=index))
            yield f"{name} of {expert}", array, tensors[name]["sha256"], boxes


def layouts(config: ModelConfig, tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Layout]:
    """How tensors are laid out in files, by path; `tensors` gives their dtypes and shapes."""
    axes = flatten(logical_axes(config))
    return {
        path: Layout.of(tuple(entry["shape"]), entry["dtype"], axes[path])
        for path, entry in tensors.items()
    }


def leaf_of(name: str) -> tuple[str, int]:
    """A contribution's tensor in a model: "layers.3.ffn.gate" is ("experts/gate", 3)."""
    _, layer, _, leaf = name.split(".")
    return f"experts/{leaf}", int(layer)


def name_of_tensor(leaf: str, layer: int) -> str:
    """The inverse of `leaf_of`."""
    leaf = leaf.removeprefix("experts/")
    return f"layers.{layer}.{'ffn' if leaf in MATRICES else 'router'}.{leaf}"


def embedder_digest(directory: Path) -> str:
    """SHA-256 over the names and contents of the embedder's files."""
    digest = hashlib.sha256()
    for path in children(directory):
        if (size := size_of(path)) > EMBEDDER_LIMIT:
            raise UserError(f"{path} has {size} bytes; expected at most {EMBEDDER_LIMIT}")
        with open_regular(path) as file:
            content = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
        digest.update(path.name.encode() + b"\0" + content.digest())
    return digest.hexdigest()


def public_digest(directory: Path) -> str:
    """SHA-256 of the public records that owners train on. Held-out records are not covered."""
    files = Index.read(directory).files
    train = {name: digest for name, digest in files.items() if name.startswith("train.")}
    return hashlib.sha256(canonical_json(train).encode()).hexdigest()


def fingerprint_of(parts: Mapping[str, Any]) -> str:
    """The digest of an anchor's parts, as `parts_of` reads them from its description."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


def tensor_digest(array: np.ndarray) -> str:
    """SHA-256 of the values in C order."""
    return hashlib.sha256(np.asarray(array, order="C").reshape(-1).view(np.uint8).data).hexdigest()
