"""Whether the bytes of an anchor or a model are those that its description says: exactly its files,
every digest, its fingerprint.

An anchor's fingerprint is the digest of `parts`: its architecture, every tensor's dtype, shape and
SHA-256, the tokenizer, the embedder and the sample of public text. A merged model keeps its
anchor's parts, so that its trunk and expert 0 are held to the same fingerprint.

What is read for a check is what is read for use: Zarr's and Orbax's own files in `weights/` must
be, byte for byte, those that weights.py writes for the tensors of the description, and nothing else
may lie beside them.
"""

import dataclasses
import hashlib
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.records import Index, open_records
from flexolmo_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer
from flexolmo_jax.description import DESCRIPTION, canonical_json
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import logical_axes, parameter_shapes
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.runtime.progress import bar
from flexolmo_jax.storage.paths import children, in_bucket, listing, open_regular, size_of
from flexolmo_jax.storage.untrusted import read_bytes
from flexolmo_jax.storage.weights import Layout, Reader, metadata_files, shard_name

RECEIPT, RECEIPT_SIGNATURE = "receipt.json", "receipt.sig"
_BESIDE = {"model": {RECEIPT, RECEIPT_SIGNATURE}}  # by kind, what may be there and need not
MATRICES = ("gate", "up", "down")
# keys of a model's config that a merge decides
OF_MERGES = ("n_experts", "n_active", "router_bias")
EMBEDDER_LIMIT = 1 << 30  # bytes of an embedder's file
ZEROS = "zeros"  # in the place of a digest: a bias that an expert does not have


def check(path: Path, description: Mapping[str, Any], config: ModelConfig) -> None:
    """Reads all of an anchor or a model. Raises UserError naming the first thing that is not what
    its description says."""
    check_files(path, description, config)
    if Tokenizer.load(path).digest != description["tokenizer"]:
        raise UserError(f"{path}: its tokenizer is not the one of its description; fetch it again")
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
                " make it anew"
            )


def check_config(path: Path, description: Mapping[str, Any]) -> None:
    """Raises UserError for a merged model that would run with another architecture than its
    fingerprint covers."""
    if (
        description["kind"] == "model"
        and description["format"] > 1
        and description["fingerprint"] is not None
    ):
        check_model(path, description["model"], description["anchor"]["model"])


def check_model(path: Path, ours: Mapping[str, Any], anchors: Mapping[str, Any]) -> None:
    """Raises UserError unless an architecture is the anchor's, but for what a merge decides."""
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
    """Names, kinds and sizes of all files, and the content of small ones; reads no weights."""
    expected, found = _sizes(path, description, config), listing(path)
    for name, content in metadata_files(layouts(config, description["tensors"])).items():
        if (
            f"weights/{name}" in found
            and _content(path / "weights" / name, len(content)) != content
        ):
            raise UserError(
                f"{path / 'weights' / name} does not belong to these tensors (another layout, or"
                f" changed); make {path} anew"
            )
    if missing := expected.keys() - found.keys():
        raise UserError(
            f"{path} is not whole: it misses {min(missing)} ({len(missing)} files are missing);"
            " fetch it again"
        )
    expected |= dict.fromkeys(found.keys() & _BESIDE.get(description["kind"], set()))
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
    """Of a regular file of at most so many bytes."""
    try:
        return read_bytes(file, size)
    except (OSError, UserError):
        return None


def _sizes(
    path: Path, description: Mapping[str, Any], config: ModelConfig
) -> dict[str, int | None]:
    """Bytes of every file by name, None where they are not known beforehand."""
    tensors, shapes = description["tensors"], parameter_shapes(config)
    for name in tensors.keys() | shapes.keys():
        got = tuple(tensors[name]["shape"]) if name in tensors else None
        if got != shapes.get(name):
            raise UserError(
                f"{path}: {name!r:.60} has the shape {got}; the model's config makes it"
                f" {shapes.get(name)}; do not use it"
            )
    target = layouts(config, tensors)
    sizes: dict[str, int | None] = {DESCRIPTION: None, TOKENIZER_FILE: None}
    sizes |= {f"weights/{name}": len(content) for name, content in metadata_files(target).items()}
    sizes |= {
        f"weights/{shard_name(at, index)}": layout.shard_bytes
        for at, layout in target.items()
        for index in layout.indices()
    }
    if description["kind"] == "anchor":
        sizes["embedder/embedder.json"] = None
        if (path / "embedder" / "embedder.npz").exists():
            sizes["embedder/embedder.npz"] = None  # covered by the embedder's digest
        sizes["public/index.json"] = None
        sizes |= dict.fromkeys(
            (f"public/{name}" for name in Index.read(path / "public").files), None
        )
    return sizes


def _check_anchor(path: Path, description: Mapping[str, Any]) -> None:
    parts = parts_of(description) | {"embedder": embedder_digest(path / "embedder")}
    if "public" in parts:
        parts["public"] = public_digest(path / "public")
    if fingerprint_of(parts) != description["fingerprint"]:
        raise UserError(
            f"{path} does not have its fingerprint: tokenizer, embedder, public text or description"
            " was changed; fetch it again"
        )
    open_records(path / "public", "train").check_digests()


def parts_of(description: Mapping[str, Any]) -> dict[str, Any]:
    """What the fingerprint of an anchor, or of the anchor that a model was merged from, is the
    digest of."""
    if description["kind"] != "anchor":
        return dict(description["anchor"])
    parts = {key: description[key] for key in ("model", "tensors", "tokenizer")} | {
        "embedder": description["embedder"]["sha256"]
    }
    return parts | (
        {"public": description["public_sha256"]} if "public_sha256" in description else {}
    )


def is_of_its_anchor(description: Mapping[str, Any]) -> bool:
    """Whether the fingerprint of a model is the one of its anchor's parts. Format 1 kept no parts:
    nobody can tell."""
    return (
        description["format"] == 1
        or fingerprint_of(parts_of(description)) == description["fingerprint"]
    )


def anchor_tensors(description: Mapping[str, Any]) -> dict[str, Any]:
    """Dtype, shape and SHA-256 of every tensor of the anchor that a merged or imported model stands
    on."""
    return description["anchor"] if description["format"] == 1 else description["anchor"]["tensors"]


def tensors_of(member: Mapping[str, Any]) -> dict[str, Any]:
    """Dtype, shape and SHA-256 of every tensor that a member of a model contributed."""
    return manifest["tensors"] if (manifest := manifest_of(member)) else member["tensors"]


def manifest_of(member: Mapping[str, Any]) -> dict[str, Any] | None:
    """The whole manifest that a member was merged with. Imported models, and those of format 1,
    have none."""
    return member["manifest"] if isinstance(member.get("manifest"), dict) else None


def tensor_digests(
    path: Path, description: Mapping[str, Any], config: ModelConfig
) -> Iterator[tuple[str, str, str]]:
    """(what, SHA-256 of its bytes on the disk, SHA-256 that it should have) of all tensors, with a
    bar. A shard at a time is in memory."""
    reader, tensors = Reader(path / "weights"), description["tensors"]
    total = sum(int(np.prod(t["shape"])) * np.dtype(t["dtype"]).itemsize for t in tensors.values())
    with bar(f"verify {path.name}", float(total), in_bytes=True) as advance:
        for what, at, expected, boxes in _jobs(description, config):
            if expected == ZEROS:
                is_zero = not any(
                    np.count_nonzero(reader.read(at, box).view(np.uint8)) for box in boxes
                )
                yield what, ZEROS if is_zero else "other numbers", expected
            else:
                yield what, reader.digest(at, boxes), expected
            values = sum(int(np.prod([part.stop - part.start for part in box])) for box in boxes)
            advance(values * np.dtype(tensors[at]["dtype"]).itemsize)


def _jobs(
    description: Mapping[str, Any], config: ModelConfig
) -> Iterator[tuple[str, str, str, Any]]:
    """(what, array, SHA-256 that it should have, its parts in the array)."""
    tensors, tuned = description["tensors"], description.get("router", {}).get("tensors", {})
    for at, layout in layouts(config, tensors).items():
        if "anchor" not in description or description["kind"] == "anchor":
            yield at, at, tensors[at]["sha256"], list(layout.boxes())
        elif at in tuned:
            yield at, at, tuned[at], layout.whole()
        elif not at.startswith("experts/"):
            yield at, at, anchor_tensors(description)[at]["sha256"], list(layout.boxes())
        else:
            yield from _expert_jobs(description, at, layout)


def _expert_jobs(
    description: Mapping[str, Any], at: str, layout: Layout
) -> Iterator[tuple[str, str, str, Any]]:
    anchor = anchor_tensors(description)
    if at in anchor:
        yield f"{at} of anchor", at, anchor[at]["sha256"], list(layout.boxes(expert=0))
    else:
        yield f"{at} of anchor", at, ZEROS, list(layout.boxes(expert=0))
    for index, member in enumerate(description["members"], 1):
        tensors = tensors_of(member)
        if name_of_tensor(at, 0) not in tensors:  # a bias that it does not have
            yield f"{at} of {member['name']}", at, ZEROS, list(layout.boxes(expert=index))
            continue
        for layer in range(layout.shape[0]):
            name = name_of_tensor(at, layer)
            yield (
                f"{name} of {member['name']}",
                at,
                tensors[name]["sha256"],
                list(layout.boxes(layer=layer, expert=index)),
            )


def layouts(config: ModelConfig, tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Layout]:
    """How tensors of an anchor, an expert or a model, of which dtype and shape are given by path,
    are stored."""
    axes = flatten(logical_axes(config))
    return {
        path: Layout.of(tuple(entry["shape"]), entry["dtype"], axes[path])
        for path, entry in tensors.items()
    }


def leaf_of(name: str) -> tuple[str, int]:
    """Where a tensor of a contribution goes in a model: ("experts/gate", 3) for
    "layers.3.ffn.gate"."""
    _, layer, _, leaf = name.split(".")
    return f"experts/{leaf}", int(layer)


def name_of_tensor(leaf: str, layer: int) -> str:
    """The inverse of `leaf_of`."""
    leaf = leaf.removeprefix("experts/")
    return f"layers.{layer}.{'ffn' if leaf in MATRICES else 'router'}.{leaf}"


def embedder_digest(directory: Path) -> str:
    """Over the names and bytes of the embedder's files."""
    digest = hashlib.sha256()
    for path in children(directory):
        if (size := size_of(path)) > EMBEDDER_LIMIT:
            raise UserError(f"{path} has {size} bytes; expected at most {EMBEDDER_LIMIT}")
        with open_regular(path) as file:
            content = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
        digest.update(path.name.encode() + b"\0" + content.digest())
    return digest.hexdigest()


def public_digest(directory: Path) -> str:
    """Of an anchor's public records that owners train on. Held-out ones leave no trace in a
    fingerprint."""
    files = Index.read(directory).files
    return hashlib.sha256(
        canonical_json({name: files[name] for name in files if name.startswith("train.")}).encode()
    ).hexdigest()


def fingerprint_of(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


def tensor_digest(array: np.ndarray) -> str:
    """SHA-256 of the values, row-major."""
    return hashlib.sha256(np.asarray(array, order="C").reshape(-1).view(np.uint8).data).hexdigest()
