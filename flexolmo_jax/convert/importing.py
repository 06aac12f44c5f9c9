"""`flexolmo import-hf`: a Hugging Face checkpoint of OLMo 2 or FlexOlmo becomes a model here,
tensor by tensor.

The files are read through the key table of huggingface.py, in our order, wherever a tensor lies: in
one file, in several with or without an index, one matrix an expert or, as transformers 5 holds them
in memory, all experts of a layer in one. Nothing is unpickled.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from pydantic import Field

from flexolmo_jax.artifact import Artifact, open_artifact, write_description
from flexolmo_jax.config import ModelConfig, to_dict
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.exchange.contribution import check_expert_name
from flexolmo_jax.integrity import layouts, name_of_tensor
from flexolmo_jax.model import init_params
from flexolmo_jax.model.tree import flatten
from flexolmo_jax.runtime.progress import bar, note
from flexolmo_jax.storage.files import check_new, clear, new_directory
from flexolmo_jax.storage.paths import absolute, children, reason
from flexolmo_jax.storage.tensorfile import TensorFile
from flexolmo_jax.storage.untrusted import conform, parse_json, read_bytes
from flexolmo_jax.storage.weights import Layout, Writer

from .huggingface import CLASSES, TOGETHER, Entry, key_table, model_config, some, transposed

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TENSORS = 1 << 17  # more than one model has, in however many files
SIGNS = TENSORS + 1000  # commas and brackets of INDEX and of config.json
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def import_hf(source: Path, out: Path, names: Sequence[str] = ()) -> Artifact:
    """Writes a model: a dense one of OLMo 2; of FlexOlmo one whose expert 0 is its anchor and whose
    others have these names (default: expert1, expert2, ...).

    Memory: a few tensors. Raises UserError, naming the config's key, tensor or file, for what our
    model does not compute and for files that are not what config.json describes. Values that are
    not finite are noted, with the tensor's name.
    """
    check_new(out)
    clear(out)
    fields = _read_json(source / "config.json")
    config = model_config(fields)
    experts = _names(names, config.n_experts)
    tokenizer = Tokenizer.load(source)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{source} has a tokenizer of {tokenizer.vocab_size} tokens and vocab_size"
            f" {config.vocab_size}; {TOGETHER}"
        )
    with ExitStack() as files:
        checkpoint = _Checkpoint(source, files)
        tensors = checkpoint.locate(
            key_table(config, fields["model_type"]), tied=bool(fields.get("tie_word_embeddings"))
        )
        shapes = flatten(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
        stored = {
            path: {"dtype": checkpoint.dtype, "shape": list(a.shape)} for path, a in shapes.items()
        }
        target = layouts(config, stored)
        with new_directory(out) as directory:
            tokenizer.save(directory / "tokenizer.json")
            anchor, members = _write(directory / "weights", config, target, tensors, experts)
            description = {
                "kind": "model",
                "model": to_dict(config),
                "experts": list(experts),
                "members": members,
                "anchor": {"tensors": anchor},
                "fingerprint": None,  # until it is published
                "imported": CLASSES[fields["model_type"]],
                "tokenizer": tokenizer.digest,
                "tensors": stored,
            }
            write_description(directory, description)
    note(
        f"imported {out}: {sum(a.size for a in shapes.values()):,} parameters in"
        f" {checkpoint.dtype}, experts {', '.join(experts)}"
    )
    return open_artifact(out)


@dataclass(frozen=True)
class _Index:
    """What is read of INDEX."""

    weight_map: dict[
        str, Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors$")]
    ]


class _Source(NamedTuple):
    """Where the values of one entry of the key table lie."""

    file: TensorFile
    name: str
    start: int  # in the tensor, in values
    entry: Entry

    def read(self) -> np.ndarray:
        """As our leaf has it."""
        values, is_finite = self.file.read_part(self.name, self.start, self.entry.shape)
        if not is_finite:
            note(f"warning: {self.name} in {self.file.path} has values that are not finite")
        return transposed(values) if self.entry.transpose else values


class _Checkpoint:
    """The safetensors files of a directory."""

    def __init__(self, directory: Path, opened: ExitStack):
        self._directory = directory
        self._files: dict[str, TensorFile] = {}  # by tensor
        for path in _tensor_files(directory):
            # a hub's cache is of links
            file = opened.enter_context(TensorFile(absolute(path), with_metadata=True))
            for name in file.entries:
                if name in self._files:
                    raise UserError(
                        f"{name} is in {self._files[name].path} and in {path}; remove the file that"
                        " does not belong there"
                    )
                self._files[name] = file
            if len(self._files) > TENSORS:
                raise UserError(
                    f"{directory} has more than {TENSORS} tensors; expected those of an OLMo 2 or"
                    " FlexOlmo model"
                )
        dtypes = {str(file.entries[name].dtype): name for name, file in self._files.items()}
        if len(dtypes) != 1:
            found = (
                " and ".join(f"{name} is {dtype}" for dtype, name in sorted(dtypes.items()))
                or "no tensors"
            )
            raise UserError(
                f"{directory} has {found}; expected all tensors in one dtype; save the model in one"
            )
        self.dtype = next(iter(dtypes))

    def locate(self, table: Sequence[Entry], tied: bool) -> dict[str, list[_Source]]:
        """By our leaf's path, in the order of its index. Raises UserError naming tensors that are
        missing, too many or of another shape."""
        found: dict[str, list[_Source]] = defaultdict(list)
        missing, used = [], set()
        experts = 1 + max((entry.index[1] for entry in table if len(entry.index) == 2), default=0)
        for entry in table:
            name, start, shape = entry.name, 0, entry.shape
            if tied and name == HEAD and name not in self._files:
                name = EMBEDDING
            elif name not in self._files:
                name, start, shape = _fused(entry, experts) or (name, start, shape)
            if name not in self._files:
                missing.append(entry.name)
                continue
            file = self._files[name]
            if file.entries[name].shape != shape:
                raise UserError(
                    f"{file.path}: {name} has shape {file.entries[name].shape}; expected {shape} by"
                    f" config.json; {TOGETHER}"
                )
            found["/".join(entry.path)].append(_Source(file, name, start, entry))
            used.add(name)
        for what, names in (
            ("misses", missing),
            ("has unexpected", sorted(self._files.keys() - used)),
        ):
            if names:
                raise UserError(f"{self._directory} {what} tensors: {some(names)}; {TOGETHER}")
        return found


def _fused(entry: Entry, experts: int) -> tuple[str, int, tuple[int, ...]] | None:
    """The tensor of all experts of a layer that this one is a part of: its name, where the part
    starts, and its shape."""
    match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", entry.name)
    if not match:
        return None
    at, expert, kind = match[1], int(match[2]), match[3]
    rows, columns = entry.shape
    if kind == "down":
        return f"{at}.down_proj", expert * rows * columns, (experts, rows, columns)
    # gate on top of up
    return (
        f"{at}.gate_up_proj",
        (2 * expert + (kind == "up")) * rows * columns,
        (experts, 2 * rows, columns),
    )


def _write(
    directory: Path,
    config: ModelConfig,
    target: Mapping[str, Layout],
    tensors: Mapping[str, list[_Source]],
    experts: Sequence[str],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Writes the weights; returns what a model's description has of its anchor and of its
    members."""
    anchor: dict[str, Any] = {}
    by_layer: list[dict[str, Any]] = [{} for _ in experts]

    def keep(path: str, index: tuple[int, ...], values: np.ndarray, of_anchor: Any) -> None:
        if not path.startswith("experts/") or not index[1]:
            of_anchor.update(values.reshape(-1).view(np.uint8).data)
        else:
            digest = hashlib.sha256(values.reshape(-1).view(np.uint8).data).hexdigest()
            entry = {"dtype": str(values.dtype), "shape": list(values.shape), "sha256": digest}
            by_layer[index[1]][name_of_tensor(path, index[0])] = entry

    total = sum(
        np.prod(layout.shape) * np.dtype(layout.dtype).itemsize for layout in target.values()
    )
    with bar("import", float(total), in_bytes=True) as advance, Writer(directory, target) as writer:
        for path, layout in target.items():
            of_anchor = hashlib.sha256()
            for index, values in _slices(layout, tensors.get(path, ())):
                writer.write_slice(path, index, values)
                if path.startswith("experts/") and len(index) < 2:  # rows of all experts and layers
                    for expert in range(values.shape[1]):
                        for layer in range(values.shape[0]):
                            keep(
                                path,
                                (layer, expert),
                                np.ascontiguousarray(values[layer, expert]),
                                of_anchor,
                            )
                else:
                    keep(path, index, values, of_anchor)
                advance(values.nbytes)
            shape = (
                [layout.shape[0], 1, *layout.shape[2:]]
                if path.startswith("experts/")
                else list(layout.shape)
            )
            anchor[path] = {"dtype": layout.dtype, "shape": shape, "sha256": of_anchor.hexdigest()}
    rest = {
        "owner": "",
        "domain": "",
        "licence": "",
        "expires": None,
        "router_bias": False,
        "privacy": "none",
        "manifest": None,
    }
    members = [
        {"name": name, **rest, "tensors": tensors, "training": {"imported": True}}
        for name, tensors in zip(experts, by_layer, strict=True)
    ]
    return anchor, members[1:]


def _slices(
    layout: Layout, sources: Sequence[_Source]
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """A leaf in parts, each contiguous: matrices one by one, vectors of all layers at once; zeros
    where the checkpoint has none."""
    if not sources:
        yield (), np.zeros(layout.shape, layout.dtype)
    elif sources[0].entry.transpose or not sources[0].entry.index:
        for source in sources:
            yield source.entry.index, source.read()
    else:
        yield (), np.stack([source.read() for source in sources]).reshape(layout.shape)


def _names(names: Sequence[str], experts: int) -> tuple[str, ...]:
    chosen = tuple(names) or tuple(f"expert{i}" for i in range(1, experts))
    if len(chosen) != experts - 1 or len(set(chosen)) != len(chosen):
        raise UserError(
            f"--names are {', '.join(chosen) or 'none'}; expected {experts - 1} different ones:"
            " expert 0 is the anchor"
        )
    for name in chosen:
        check_expert_name(name)
    return ("anchor", *chosen)


def _tensor_files(directory: Path) -> list[Path]:
    """Raises UserError where there are none, or not all of them."""
    present = [path.name for path in children(directory)]
    found = [name for name in present if name.endswith(".safetensors")]
    expected = found
    if INDEX in present:
        weights: dict[str, Any] = {"weight_map": _read_json(directory / INDEX).get("weight_map")}
        try:
            conform(_Index, weights)
        except ValueError as error:
            raise UserError(
                f"{directory / INDEX} has no weight_map from tensors to files beside it ({error});"
                " download it again"
            ) from None
        expected = sorted(set(weights["weight_map"].values()))
    elif found and (match := re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.safetensors", found[0])):
        expected = [
            f"{match[1]}-{i:05}-of-{match[2]}.safetensors" for i in range(1, int(match[2]) + 1)
        ]
    if missing := sorted(set(expected) - set(found)):
        raise UserError(f"{directory} misses {some(missing)}; download the whole checkpoint")
    if not expected:
        if pickles := [name for name in present if name.endswith(PICKLES)]:
            raise UserError(
                f"{directory} has its weights in {pickles[0]}, a pickle, which may run any program"
                " when loaded; have its owner save it as safetensors"
            )
        raise UserError(
            f"{directory} has no *.safetensors; expected a checkpoint as save_pretrained writes it"
        )
    return [directory / name for name in expected]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = parse_json(read_bytes(absolute(path)), SIGNS)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {reason(error)}; expected the directory of a Hugging Face"
            " checkpoint"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error!s:.120}; download it again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not an object of JSON; download it again")
    return fields
